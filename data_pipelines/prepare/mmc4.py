"""Make shards of MMC4 from its docs_*.jsonl.zip files and the folder of pictures that you downloaded for them.

Every page becomes <key>.json, the page as it was, and <key>.{i}.jpg (png, webp, ...): picture i of its image_info as it
was downloaded. Pictures that are missing leave a gap, as the readers expect.

example: python -m data_pipelines.prepare.mmc4 'mmc4/docs_no_face_shard_*_v2.jsonl.zip' --images mmc4/images \\
             --out shards/mmc4
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from conf import UserError, run_cli
from data_pipelines.prepare.commands import make_parser, print_report, read_task
from data_pipelines.prepare.jobs import Entry, Input, make_shards, split_inputs, unusable_entry
from data_pipelines.prepare.safe_files import picture_extension, read_file
from data_pipelines.prepare.shard_writer import Sample, sample_of
from data_pipelines.shards import expand_shards, open_shard, stat_shard
from data_pipelines.sources.common import SampleError

# Real pages have some 10 kB, real archives some 50 MB when unpacked; a bomb has no bound.
MAX_PAGE_BYTES = 4 << 20
MAX_UNPACKED_BYTES = 2 << 30
MAX_PICTURES = 1000
MAX_PICTURES_BYTES = 512 << 20
FOLDERS = ("number", "position", "flat")


class PageOptions(NamedTuple):
    """pictures: folder of one archive's pictures; key: beginning of its samples' keys."""

    pictures: Path
    key: str
    layout: str
    max_picture_bytes: int


def main() -> None:
    arguments = _parse_arguments()
    task = read_task(arguments)
    if not arguments.images.is_dir():
        raise UserError(f"--images {arguments.images} is no folder: name the one that holds the downloaded pictures")
    settings = {
        "command": "mmc4",
        "samples_per_shard": arguments.samples_per_shard,
        "images": str(arguments.images.resolve()),
        "folders": arguments.folders,
        "layout": arguments.layout,
        "max_image_mb": arguments.max_image_mb,
    }
    parts = split_inputs(_find_inputs(arguments), arguments.samples_per_shard, task)
    report = make_shards(arguments.out, settings, parts, unit="pages", total=None)
    print_report(report, arguments.out, kind="mmc4", unit="pages", task=task)


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser("mmc4", __doc__, samples_per_shard=1000)
    parser.add_argument("pages", help="path, glob or brace pattern of the .jsonl.zip (or .jsonl) files, in quotes")
    parser.add_argument("--images", type=Path, required=True, help="folder of the downloaded pictures")
    parser.add_argument(
        "--folders",
        choices=FOLDERS,
        default="number",
        help="where in it a file's pictures are: in the folder of the number in the file's name; of its position in "
        "the list, from 0 on, as MMC4's own download script does (the same if the list has no gap); or flat: in "
        "<file>_images or in --images itself (default %(default)s)",
    )
    parser.add_argument(
        "--layout",
        choices=("lean", "openflamingo"),
        default="lean",
        help="pictures as members of their own, or base64 in the json, a third larger (default %(default)s)",
    )
    parser.add_argument("--max-image-mb", type=float, default=64.0, help="larger files are left out (%(default)s)")
    return parser.parse_args()


def _find_inputs(arguments: argparse.Namespace) -> list[Input]:
    """In the order of their numbers: shard 10 comes after shard 9."""
    urls = sorted(expand_shards(arguments.pages), key=lambda url: (_number_of(url), url))
    inputs = []
    for position, url in enumerate(urls):
        options = PageOptions(
            _pictures_folder(arguments.images, arguments.folders, url, position),
            _stem(url),
            arguments.layout,
            int(arguments.max_image_mb * 2**20),
        )
        inputs.append(Input(_stem(url), str(stat_shard(url).size), partial(_read_entries, url, options)))
    if not any(_folder_exists(source) for source in inputs):
        wanted = _options_of(inputs[0]).pictures
        raise UserError(
            f"no file has a folder of pictures ({wanted} is missing, for one): check --images and --folders"
        )
    return inputs


def _options_of(source: Input) -> PageOptions:
    return source.entries.args[1]  # type: ignore[attr-defined]


def _folder_exists(source: Input) -> bool:
    return _options_of(source).pictures.is_dir()


def _stem(url: str) -> str:
    """The file's name up to the first dot, in letters that a key may have."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", url.rpartition("/")[2].partition(".")[0]) or "pages"


def _number_of(url: str) -> int:
    """7 of docs_no_face_shard_7_v2.jsonl.zip; -1 without such a number."""
    number = re.search(r"shard_(\d{1,9})", url.rpartition("/")[2])
    return int(number.group(1)) if number else -1


def _pictures_folder(images: Path, folders: str, url: str, position: int) -> Path:
    if folders == "flat":
        own = images / f"{_stem(url)}_images"
        return own if own.is_dir() else images
    number = position if folders == "position" else _number_of(url)
    return images / (str(number) if number >= 0 else _stem(url))


def _read_entries(url: str, options: PageOptions) -> Iterator[Entry]:
    """A page a line. What is damaged is an entry as well, which gives no sample but a reason."""
    try:
        with open_shard(url) as stream:
            for number, line in enumerate(_read_lines(stream, MAX_UNPACKED_BYTES)):
                yield Entry(str(number), partial(_load_page, line, number, options))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError):
        yield unusable_entry("damage", "file damaged: the rest of it is left out")


def _read_lines(stream: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Lines of a jsonl, packed or not; one that is too long comes as its beginning, which is no json."""
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            # The member's name is only looked at: nothing is ever unpacked to disk.
            name = next(info for info in archive.infolist() if not info.is_dir())
            with archive.open(name) as lines:
                yield from _bounded_lines(lines, max_bytes)  # type: ignore[arg-type]
    else:
        stream.seek(0)
        yield from _bounded_lines(stream, max_bytes)


def _bounded_lines(lines: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    total = 0
    while line := lines.readline(MAX_PAGE_BYTES):
        rest = line
        total += len(line)
        while len(rest) == MAX_PAGE_BYTES and not rest.endswith(b"\n") and total <= max_bytes:
            rest = lines.readline(MAX_PAGE_BYTES)
            total += len(rest)
        if total > max_bytes:
            raise ValueError("more than any real file holds")
        if line.strip():
            yield line if rest is line else b"too long"


def _load_page(line: bytes, number: int, options: PageOptions, notes: Counter[str]) -> Sample:
    page = _parse_page(line)
    pictures = _read_pictures(page["image_info"], options, notes)
    key = f"{options.key}-{number:06d}"
    if options.layout == "lean":
        members = {f"{place}.{picture_extension(picture)}": picture for place, picture in pictures.items()}
        return sample_of(key, {**members, "json": line.strip()})
    for place, picture in pictures.items():
        page["image_info"][place]["image_base64"] = base64.b64encode(picture).decode("ascii")
    return sample_of(key, {"json": json.dumps(page).encode()})


def _parse_page(line: bytes) -> dict[str, Any]:
    try:
        page = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleError("page is no json") from error
    if not (isinstance(page, dict) and isinstance(page.get("text_list"), list)):
        raise SampleError("page has no text_list")
    infos = page.get("image_info")
    if not (isinstance(infos, list) and all(isinstance(info, dict) for info in infos)):
        raise SampleError("page has no image_info")
    if len(infos) > MAX_PICTURES:
        raise SampleError("page has too many images")
    return page


def _read_pictures(infos: list[dict[str, Any]], options: PageOptions, notes: Counter[str]) -> dict[int, bytes]:
    """Encoded pictures by their place in image_info; those that cannot be used are counted and left out."""
    pictures = {}
    room = MAX_PICTURES_BYTES
    for place, info in enumerate(infos):
        notes["images named by the pages"] += 1
        try:
            name = info.get("image_name")
            limit = min(room, options.max_picture_bytes)
            picture = read_file(options.pictures, name, noun="image", max_bytes=limit)
        except SampleError as unusable:
            notes[unusable.reason] += 1
            continue
        if picture_extension(picture):
            pictures[place] = picture
            room -= len(picture)
        else:
            notes["image file is no picture"] += 1
    return pictures


if __name__ == "__main__":
    run_cli(main)
