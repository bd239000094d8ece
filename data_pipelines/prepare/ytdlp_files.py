"""Storyboards as yt-dlp leaves them: <name>.info.json, <name>.mhtml and <name>.<language>.vtt (or json3, srt)."""

from __future__ import annotations

import re
from collections import Counter
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any

from data_pipelines.prepare.safe_files import read_file
from data_pipelines.prepare.shard_writer import Sample
from data_pipelines.prepare.storyboard_files import (
    MAX_JSON_BYTES,
    MAX_SHEETS,
    Board,
    Grid,
    board_sample,
    parse_object,
    positive,
    positive_int,
    share_tiles,
    sheet_grid,
)
from data_pipelines.sources.common import SampleError, valid_unicode
from data_pipelines.subtitles import FORMATS, Line, parse_subtitles

# The longest videos have some 400 sheets of some 50 kB.
MAX_MHTML_BYTES = 64 << 20
MAX_SUBTITLE_BYTES = 16 << 20
MAX_HEADER_BYTES = 1 << 14
MAX_BOUNDARY = 70  # by the standard
SUFFIX = ".info.json"
CONTENT_ID = re.compile(r"<(\d{1,6})\.")
LEVEL = re.compile(r"/storyboard\d+_L(\d)/")


def load_ytdlp(folder: Path, name: str, language: str, notes: Counter[str]) -> Sample:
    """The storyboard of folder/name, an .info.json; raises `SampleError`."""
    stem = name.removesuffix(SUFFIX)
    info = parse_object(read_file(folder, name, noun="info.json", max_bytes=MAX_JSON_BYTES), "info.json")
    form = _storyboard_format(info)
    sheets = read_sheets(read_file(folder, f"{stem}.mhtml", noun="mhtml", max_bytes=MAX_MHTML_BYTES))
    tile = positive_int(form["width"]), positive_int(form["height"])
    duration = _duration(info, form)
    grids = _grids(form, duration, tile, sheets)
    subtitles, is_auto = _read_subtitles(folder, stem, info, language)
    level = LEVEL.search(str(form.get("url")))
    board = Board(
        video_id=str(info["id"]),
        url=_text(info.get("webpage_url")),
        title=_text(info.get("title")),
        duration=duration,
        tile_width=tile[0],
        tile_height=tile[1],
        grids=grids,
        sheets={number: sheet for number, sheet in sheets.items() if number < len(grids)},
        subtitles=subtitles,
        language=language,
        is_auto=is_auto,
        origin={
            "level": int(level.group(1)) if level else None,
            "format_id": form["format_id"],
            "columns": form["columns"],
            "rows": form["rows"],
        },
    )
    sample = board_sample(board, notes)
    notes["subtitles by a machine" if is_auto else "subtitles by people"] += 1
    return sample


def _storyboard_format(info: dict[str, Any]) -> dict[str, Any]:
    """The format that was downloaded, else the best storyboard: yt-dlp calls it sb0."""
    boards = {
        form["format_id"]: form
        for form in info.get("formats") or []
        if str(form.get("format_id")).startswith("sb") and form.get("protocol") == "mhtml"
    }
    form = boards.get(info.get("format_id")) or boards.get("sb0")
    if not form:
        raise SampleError("info.json names no storyboard")
    return form


def _duration(info: dict[str, Any], form: dict[str, Any]) -> float:
    """Seconds. info.duration is in whole ones; the fragments of the storyboard sum up to the exact time."""
    fragments = form.get("fragments") or []
    if fragments and all("duration" in fragment for fragment in fragments):
        return round(positive(sum(float(fragment["duration"]) for fragment in fragments)), 3)
    return positive(info.get("duration"))


def _grids(form: dict[str, Any], duration: float, tile: tuple[int, int], sheets: dict[int, bytes]) -> list[Grid]:
    columns, rows = positive_int(form["columns"]), positive_int(form["rows"])
    num_tiles = round(positive(form["fps"]) * duration)
    num_sheets = len(form.get("fragments") or []) or max(sheets, default=0) + 1
    counts = share_tiles(num_tiles, num_sheets, columns * rows)
    return [sheet_grid(columns, rows, count, tile, sheets.get(number)) for number, count in enumerate(counts)]


def read_sheets(mhtml: bytes) -> dict[int, bytes]:
    """Encoded pictures by the number in their Content-ID: yt-dlp leaves failed ones out without a trace.

    Only headers go through the email package: it would cut pictures into lines, and take for ever with nested parts.
    """
    try:
        boundary = (_parse_headers(mhtml)[0].get_boundary() or "").encode("ascii")
        if not 0 < len(boundary) <= MAX_BOUNDARY:
            raise ValueError("no boundary")
        parts = mhtml.split(b"\r\n--" + boundary, MAX_SHEETS + 2)[1:-1]
        numbered = [_read_part(part) for part in parts]
    except Exception as error:  # hostile headers make the email package raise almost anything
        raise SampleError("mhtml does not parse") from error
    if len(parts) > MAX_SHEETS:
        raise SampleError("unlikely number of sheets")
    return {number: sheet for number, sheet in numbered if number is not None and sheet}


def _parse_headers(part: bytes) -> tuple[Message, int]:
    """The headers that a part begins with, and where its body begins; raises ValueError without an end of them."""
    end = part.index(b"\r\n\r\n", 0, MAX_HEADER_BYTES)
    return BytesParser().parsebytes(part[:end].lstrip(b"\r\n"), headersonly=True), end + 4


def _read_part(part: bytes) -> tuple[int | None, bytes]:
    """Number and bytes of a sheet; no number for other parts and for what is shorter than its header says."""
    headers, start = _parse_headers(part)
    number = CONTENT_ID.match(str(headers.get("Content-ID")))
    length = headers.get("Content-length")
    if not number or headers.get_content_maintype() != "image":
        return None, b""
    if length is not None and int(length) != len(part) - start:
        return None, b""
    return int(number.group(1)), part[start:]


def _read_subtitles(folder: Path, stem: str, info: dict[str, Any], language: str) -> tuple[list[Line], bool]:
    """Lines, and whether a machine wrote them; yt-dlp prefers what people wrote."""
    by_hand = _languages(info.get("subtitles"), language)
    for code in dict.fromkeys([*by_hand, language, f"{language}-orig"]):
        for form in FORMATS:
            try:
                content = read_file(folder, f"{stem}.{code}.{form}", noun="subtitles", max_bytes=MAX_SUBTITLE_BYTES)
            except SampleError as unusable:
                if unusable.reason == "subtitles missing":
                    continue
                raise
            lines = _parse(content, form)
            return lines, code not in by_hand
    raise SampleError("no subtitles")


def _languages(available: Any, language: str) -> list[str]:
    """en, en-GB, ... of what people wrote, the plain one first."""
    codes = [str(code) for code in available or {}]
    return sorted(code for code in codes if code == language or code.startswith(f"{language}-"))[:20]


def _parse(content: bytes, form: str) -> list[Line]:
    try:
        lines = parse_subtitles(content.decode("utf-8-sig", "replace"), form)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise SampleError("subtitles do not parse") from error
    return [line._replace(text=valid_unicode(line.text)) for line in lines]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
