"""Make shards of WebVid from its csv (results_10M_train.csv and the like) and the folder of videos that you have.

Every row whose video is there becomes <key>.mp4, <key>.txt and <key>.json, as video2dataset writes them. Columns are
found by their names. A video is looked for at <videos>/<page_dir>/<videoid>.mp4 and at <videos>/<videoid>.mp4.

example: python -m data_pipelines.prepare.webvid results_10M_train.csv --videos videos --out shards/webvid
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import TextIO

from conf import UserError, run_cli
from data_pipelines.headers import check_video
from data_pipelines.prepare.commands import make_parser, print_report, read_task
from data_pipelines.prepare.jobs import Entry, Input, make_shards, split_inputs, unusable_entry
from data_pipelines.prepare.safe_files import is_plain_name, read_file
from data_pipelines.prepare.shard_writer import Sample, sample_of
from data_pipelines.shards import expand_shards, is_local, local_path
from data_pipelines.sources.common import SampleError

REQUIRED_COLUMNS = ("videoid", "name")
# One quote that is never closed must not swallow the rest of the file.
MAX_FIELD_CHARACTERS = 1 << 16
Row = dict[str, str]


def main() -> None:
    arguments = _parse_arguments()
    task = read_task(arguments)
    if not arguments.videos.is_dir():
        raise UserError(f"--videos {arguments.videos} is no folder: name the one that holds the downloaded videos")
    settings = {
        "command": "webvid",
        "samples_per_shard": arguments.samples_per_shard,
        "videos": str(arguments.videos.resolve()),
        "max_video_mb": arguments.max_video_mb,
    }
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    max_bytes = int(arguments.max_video_mb * 2**20)
    inputs = [_open_input(url, arguments.videos, max_bytes) for url in expand_shards(arguments.rows)]
    parts = split_inputs(inputs, arguments.samples_per_shard, task)
    report = make_shards(arguments.out, settings, parts, unit="rows", total=None)
    print_report(report, arguments.out, kind="webvid", unit="rows", task=task)


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser("webvid", __doc__, samples_per_shard=1000)
    parser.add_argument("rows", help="path, glob or brace pattern of the csv files, in quotes")
    parser.add_argument("--videos", type=Path, required=True, help="folder of the downloaded videos")
    parser.add_argument("--max-video-mb", type=float, default=256.0, help="larger files are left out (%(default)s)")
    return parser.parse_args()


def _open_input(url: str, videos: Path, max_bytes: int) -> Input:
    """Raises UserError for what is no WebVid table."""
    if not is_local(url):
        raise UserError(f"the table {url} is not on this machine: copy it here first")
    path = Path(local_path(url))
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            columns = next(csv.reader(_bounded_lines(stream)), [])
        size = path.stat().st_size
    except (OSError, csv.Error) as error:
        raise UserError(f"the table {path} cannot be read ({error}): restore it") from error
    lacking = [column for column in REQUIRED_COLUMNS if column not in columns]
    if lacking:
        raise UserError(f"the table {path} has no column {lacking[0]}: its first line must name WebVid's columns")
    name = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem) or "rows"
    return Input(name, str(size), partial(_read_entries, path, videos, max_bytes))


def _read_entries(path: Path, videos: Path, max_bytes: int) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = csv.reader(_bounded_lines(stream))
        columns = next(rows)
        for number in count():
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield unusable_entry(str(number), "row does not parse")
                continue
            row = dict(zip(columns, values, strict=False))
            yield Entry(str(number), partial(_load_row, row, number, videos, max_bytes))


def _bounded_lines(stream: TextIO) -> Iterator[str]:
    """Lines; one beyond every bound comes in pieces, which give rows that make no sense."""
    while line := stream.readline(16 * MAX_FIELD_CHARACTERS):
        yield line


def _load_row(row: Row, number: int, videos: Path, max_bytes: int, notes: Counter[str]) -> Sample:
    if not all(row.get(column) for column in REQUIRED_COLUMNS):
        raise SampleError("row without videoid or name")
    video = _read_video(row, videos, max_bytes)
    reason = check_video(video)
    if reason:
        raise SampleError(f"video file is {reason}")
    key = f"{number:08d}"
    meta = json.dumps(_describe(row, key), indent=4)
    return sample_of(key, {"json": meta.encode(), "mp4": video, "txt": row["name"].encode("utf-8", "replace")})


def _read_video(row: Row, videos: Path, max_bytes: int) -> bytes:
    """In its page's folder, else directly in the folder of videos. A page_dir may be NaN or no name at all."""
    name = f"{row['videoid']}.mp4"
    page = row.get("page_dir")
    if page and is_plain_name(page) and (videos / page).is_dir():
        try:
            return read_file(videos, page, name, noun="video", max_bytes=max_bytes)
        except SampleError as unusable:
            if unusable.reason != "video missing":
                raise
    return read_file(videos, name, noun="video", max_bytes=max_bytes)


def _describe(row: Row, key: str) -> dict[str, object]:
    """Fields and their order are video2dataset's."""
    fields: dict[str, object] = {
        name: _number_or_text(row[name]) for name in ("videoid", "page_idx", "page_dir", "duration") if name in row
    }
    return {
        **fields,
        "caption": row["name"],
        "url": row.get("contentUrl"),
        "key": key,
        "status": "success",
        "error_message": None,
        "yt_meta_dict": None,
    }


def _number_or_text(value: str) -> int | str:
    return int(value) if re.fullmatch(r"0|[1-9][0-9]{0,17}", value) else value


if __name__ == "__main__":
    run_cli(main)
