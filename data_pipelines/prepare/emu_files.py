"""Storyboards as the tools of Emu's repository leave them, before its own maker packs them.

A patched video2dataset writes <key>.json and the sheets <key>_{i}.webp, a transcript tool <video id>.json with the
subtitles, and a label folder holds <video id>.json with the duration.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

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
    sheet_grid,
)
from data_pipelines.sources.common import SampleError, valid_unicode
from data_pipelines.subtitles import Line

MAX_SHEET_BYTES = 16 << 20
SHEET_EXTENSIONS = ("webp", "jpg", "png")
VIDEO_IN_URL = re.compile(r"(?:[?&]v=|youtu\.be/|/shorts/|/embed/|^)([A-Za-z0-9_-]{11})(?:[?&#/]|$)")


class EmuFolders(NamedTuple):
    """transcripts: <video id>.json with subtitles; labels: <video id>.json with the duration."""

    transcripts: Path
    labels: Path


def load_emu(folder: Path, name: str, folders: EmuFolders, language: str, notes: Counter[str]) -> Sample:
    """The storyboard of folder/name, a <key>.json; raises `SampleError`."""
    key = name.removesuffix(".json")
    meta = parse_object(read_file(folder, name, noun="json", max_bytes=MAX_JSON_BYTES), "json")
    grids = (meta.get("yt_meta_dict") or {}).get("sb")
    if not grids:
        raise SampleError("json names no storyboard")
    found = VIDEO_IN_URL.search(str(meta.get("url")))
    if not found:
        raise SampleError("json names no video")
    sheets = _read_sheets(folder, key, len(grids))
    tile, full_grids = _grids(grids, sheets)
    board = Board(
        video_id=found.group(1),
        url=str(meta["url"]),
        duration=_duration(folders.labels, found.group(1)),
        tile_width=tile[0],
        tile_height=tile[1],
        grids=full_grids,
        sheets=sheets,
        subtitles=_read_transcript(folders.transcripts, found.group(1)),
        language=language,
    )
    return board_sample(board, notes)


def _grids(grids: dict[str, Any], sheets: dict[int, bytes]) -> tuple[tuple[int, int], list[Grid]]:
    """Size of a tile, and the grids; Emu keeps [sheet width, sheet height, columns, rows, frames, type] of each."""
    if len(grids) > MAX_SHEETS:
        raise SampleError("unlikely number of sheets")
    rows_of = [[positive_int(value) for value in grids[str(number)][:5]] for number in range(len(grids))]
    width, height, columns, rows, _ = rows_of[0]
    tile = width // columns, height // rows
    if 0 in tile:
        raise SampleError("unlikely grid")
    made = [
        sheet_grid(columns, rows, min(count, columns * rows), tile, sheets.get(number))
        for number, (_, _, columns, rows, count) in enumerate(rows_of)
    ]
    return tile, made


def _read_sheets(folder: Path, key: str, num_sheets: int) -> dict[int, bytes]:
    sheets = {}
    for number in range(min(num_sheets, MAX_SHEETS)):
        for extension in SHEET_EXTENSIONS:
            try:
                sheet = read_file(folder, f"{key}_{number}.{extension}", noun="sheet", max_bytes=MAX_SHEET_BYTES)
            except SampleError as unusable:
                if unusable.reason != "sheet missing":
                    raise
            else:
                sheets[number] = sheet
                break
    return sheets


def _duration(labels: Path, video_id: str) -> float:
    label = parse_object(read_file(labels, f"{video_id}.json", noun="label", max_bytes=MAX_JSON_BYTES), "label")
    return positive(label.get("duration"))


def _read_transcript(transcripts: Path, video_id: str) -> list[Line]:
    """[{"text", "start", "duration"}, ...] in seconds."""
    content = read_file(transcripts, f"{video_id}.json", noun="transcript", max_bytes=MAX_JSON_BYTES)
    try:
        spoken = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError("transcript is no json") from error
    return [
        Line(float(line["start"]), float(line.get("duration") or 0), valid_unicode(line["text"])) for line in spoken
    ]
