"""A storyboard on its way from downloaded files to a shard, whichever tool wrote the files."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipelines.headers import DecodeError, header_size
from data_pipelines.prepare.safe_files import picture_extension
from data_pipelines.prepare.shard_writer import Sample, sample_of
from data_pipelines.sources.common import SampleError
from data_pipelines.sources.storyboard_forms import MAX_TILES_PER_SHEET, frame_interval
from data_pipelines.subtitles import Line

VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_SHEETS = 1000
MAX_SHEET_PIXELS = 64_000_000
MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True)
class Grid:
    """Tiles of one sheet as it lies in the file (the last one is cropped), and its extension; "" = no sheet."""

    columns: int
    rows: int
    count: int
    ext: str


@dataclass(frozen=True)
class Board:
    """What is known of a storyboard. Sizes in pixels; sheets: number -> encoded picture.

    origin: further fields of the json's "storyboard", which tell where it is from.
    """

    video_id: str
    url: str | None
    duration: float
    tile_width: int
    tile_height: int
    grids: Sequence[Grid]
    sheets: dict[int, bytes]
    subtitles: Sequence[Line]
    language: str
    title: str | None = None
    is_auto: bool | None = None
    origin: dict[str, Any] = field(default_factory=dict)


def board_sample(board: Board, notes: Counter[str]) -> Sample:
    """<id>.json and the sheets <id>.sb_{i}.*; raises `SampleError` where the reader would find nothing to read."""
    if not VIDEO_ID.fullmatch(board.video_id):
        raise SampleError("video id has an unsafe name")
    if not board.sheets:
        raise SampleError("no sheet")
    if not board.subtitles:
        raise SampleError("no subtitles")
    notes["sheets named by the storyboards"] += len(board.grids)
    if len(board.sheets) < len(board.grids):
        notes["sheet missing"] += len(board.grids) - len(board.sheets)
    members = {"json": json.dumps(_describe(board)).encode()}
    for number, sheet in sorted(board.sheets.items()):
        members[f"sb_{number}.{board.grids[number].ext}"] = sheet
    return sample_of(board.video_id, members)


def _describe(board: Board) -> dict[str, Any]:
    count = sum(grid.count for grid in board.grids)
    story = {
        **board.origin,
        "tile_width": board.tile_width,
        "tile_height": board.tile_height,
        "count": count,
        "interval": frame_interval(board.duration, count),
        "interval_source": "round",
        "sheets": [asdict(grid) for grid in board.grids],
    }
    return {
        "video_id": board.video_id,
        "url": board.url,
        "title": board.title,
        "duration": board.duration,
        "storyboard": story,
        "subtitles": [line._asdict() for line in board.subtitles],
        "language": board.language,
        "is_auto": board.is_auto,
    }


def sheet_grid(columns: int, rows: int, num_tiles: int, tile: tuple[int, int], encoded: bytes | None) -> Grid:
    """The grid of a sheet by its own size, where it is there; raises `SampleError` when its tiles do not fit into it.

    columns, rows: of a full sheet; num_tiles: that this one holds; tile: width and height.
    """
    height = math.ceil(num_tiles / columns)
    width = columns if height > 1 else num_tiles
    if encoded is None:
        return Grid(width, height, num_tiles, "")
    try:
        pixels = header_size(encoded, MAX_SHEET_PIXELS)
    except DecodeError as error:
        raise SampleError(f"sheet: {error.reason}") from error
    width, found_rows = min(columns, pixels[0] // tile[0]), min(rows, pixels[1] // tile[1])
    if width * found_rows < num_tiles or (found_rows > 1 and width < columns):
        raise SampleError("sheet smaller than its tiles")
    return Grid(width, found_rows, num_tiles, picture_extension(encoded) or "")


def share_tiles(num_tiles: int, num_sheets: int, tiles_per_sheet: int) -> list[int]:
    """Tiles of each sheet: all are full but the last."""
    if not 0 < num_sheets <= MAX_SHEETS:
        raise SampleError("unlikely number of sheets")
    if not 0 < tiles_per_sheet <= MAX_TILES_PER_SHEET:
        raise SampleError("unlikely grid")
    if not tiles_per_sheet * (num_sheets - 1) < num_tiles <= tiles_per_sheet * num_sheets:
        raise SampleError("tiles and sheets do not agree")
    return [min(tiles_per_sheet, num_tiles - number * tiles_per_sheet) for number in range(num_sheets)]


def positive(value: Any) -> float:
    """A finite number above 0; raises ValueError (a malformed record) else."""
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError("not a positive number")
    return number


def positive_int(value: Any) -> int:
    number = positive(value)
    if number != int(number) or number > 1e6:
        raise ValueError("not a reasonable whole number")
    return int(number)


def parse_object(content: bytes, noun: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{noun} is no json") from error
    if not isinstance(parsed, dict):
        raise SampleError(f"{noun} is no json object")
    return parsed
