"""The three ways in which storyboards are stored, read into one timeline.

Raw: <id>.json and whole sheets <id>.sb_{i}.webp; subtitles in the json, else in <id>.json3 (vtt, srt). Emu's maker,
two forms: <id>.final_meta.json with whole sheets <id>.sb_{i}.webp, or with single frames <id>.{i}.png, each with
<id>.{i}.txt, what is said before it.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.document import Image, RawSample
from data_pipelines.sources.common import SampleError, clean_subtitle, parse_json
from data_pipelines.subtitles import FORMATS, parse_subtitles

FRAME_MEMBER = re.compile(r"(\d{1,6})\.(?:png|jpg|jpeg|webp)")
TEXT_MEMBER = re.compile(r"(\d{1,6})\.txt")
SHEET_MEMBER = re.compile(r"sb_(\d{1,6})\.(?:webp|jpg|jpeg|png)")
# YouTube's densest grid has 10 x 10 tiles; a count from a stranger's json must not make us loop for ever.
MAX_TILES_PER_SHEET = 1024


class Timeline(NamedTuple):
    """Pictures in time order; texts[i] is what is said before pictures[i] and after the picture before it.

    There is one text more than pictures: the last one follows the last picture. Texts may be empty.
    """

    pictures: list[Image]
    texts: list[str]


class Sheet(NamedTuple):
    """Grid of one sheet; its last row may be cropped. Sizes in pixels."""

    columns: int
    rows: int
    num_tiles: int
    tile_width: int
    tile_height: int


def read_timeline(sample: RawSample) -> Timeline:
    if any(FRAME_MEMBER.fullmatch(name) for name in sample.members):
        return _read_split_form(sample)
    if "final_meta.json" in sample.members:
        return _read_emu_sheets(sample)
    if "json" not in sample.members:
        raise SampleError("no json")
    return _read_raw_form(sample)


def _read_split_form(sample: RawSample) -> Timeline:
    frames = _numbered_members(sample, FRAME_MEMBER)
    texts = _numbered_members(sample, TEXT_MEMBER)
    numbers = sorted(frames)
    # Text i comes before frame i: it starts half a step earlier.
    spoken = [(number - 0.5, text.decode("utf-8", "replace")) for number, text in texts.items()]
    return Timeline([Image(frames[number]) for number in numbers], _merge_texts(numbers, spoken))


def _read_raw_form(sample: RawSample) -> Timeline:
    meta = parse_json(sample)
    board = meta["storyboard"]
    tile = (board["tile_width"], board["tile_height"])
    sheets = [Sheet(grid["columns"], grid["rows"], grid["count"], *tile) for grid in board["sheets"]]
    interval = board.get("interval")
    subtitles = meta.get("subtitles") or _subtitle_member(sample)
    return _read_sheets(sample, sheets, interval, meta.get("duration"), subtitles)


def _subtitle_member(sample: RawSample) -> list[dict[str, Any]]:
    """Lines of <id>.json3, <id>.vtt or <id>.srt, for makers that keep the subtitles as they were downloaded."""
    form = next((form for form in FORMATS if form in sample.members), None)
    lines = parse_subtitles(sample.members[form].decode("utf-8-sig", "replace"), form) if form else []
    return [line._asdict() for line in lines]


def _read_emu_sheets(sample: RawSample) -> Timeline:
    meta = parse_json(sample, "final_meta.json")
    grids = [grid for _, grid in sorted(meta["sb"].items(), key=lambda item: int(item[0]))]
    sheets = [
        Sheet(columns, rows, count, width // columns, height // rows)
        for width, height, columns, rows, count, *_ in grids
    ]
    return _read_sheets(sample, sheets, None, meta.get("duration"), meta.get("subtitle") or [])


def _read_sheets(
    sample: RawSample, sheets: Sequence[Sheet], interval: float | None, duration: float | None, subtitles: Sequence[Any]
) -> Timeline:
    """Frames get their time from their place among all sheets, so a missing sheet leaves a gap and shifts nothing."""
    counts = [max(0, min(sheet.num_tiles, sheet.columns * sheet.rows, MAX_TILES_PER_SHEET)) for sheet in sheets]
    first_frames = itertools.accumulate(counts, initial=0)
    members = _numbered_members(sample, SHEET_MEMBER)
    times: list[float] = []
    pictures: list[Image] = []
    step = interval if interval and interval > 0 else frame_interval(duration, sum(counts))
    for number, (sheet, count, first) in enumerate(zip(sheets, counts, first_frames, strict=False)):
        if number in members:
            pictures += [Image(members[number], _tile_box(sheet, tile)) for tile in range(count)]
            times += [(first + tile) * step for tile in range(count)]
    spoken = [(line["start"], line["text"]) for line in subtitles]
    return Timeline(pictures, _merge_texts(times, spoken))


def frame_interval(duration: float | None, num_frames: int) -> float:
    """Seconds between frames where the maker kept none: Emu's rule (whole seconds), exact below one second."""
    if not (duration and duration > 0 and num_frames):
        raise SampleError("no duration")
    return round(duration / num_frames) or duration / num_frames


def _tile_box(sheet: Sheet, tile: int) -> tuple[int, int, int, int]:
    row, column = divmod(tile, sheet.columns)
    left, upper = column * sheet.tile_width, row * sheet.tile_height
    return left, upper, left + sheet.tile_width, upper + sheet.tile_height


def _merge_texts(times: Sequence[float], spoken: Sequence[tuple[float, str]]) -> list[str]:
    """Texts between frames, joined by a space; a text that starts with a frame comes after it."""
    merged: list[list[str]] = [[] for _ in range(len(times) + 1)]
    heard = [(start, text) for start, text in spoken if math.isfinite(start)]
    for start, text in sorted(heard, key=lambda line: line[0]):
        merged[bisect_right(times, start)].append(clean_subtitle(text))
    return [" ".join(text for text in texts if text) for texts in merged]


def _numbered_members(sample: RawSample, pattern: re.Pattern[str]) -> Mapping[int, bytes]:
    """Members by number (webdataset sorts names as text: 10 comes before 2)."""
    matches = ((pattern.fullmatch(name), member) for name, member in sample.members.items())
    return {int(match.group(1)): member for match, member in matches if match}
