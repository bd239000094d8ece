"""Make shards of storyboards from the files that yt-dlp or the tools of Emu's repository have downloaded.

Every video becomes <id>.json (grid of the sheets, subtitles, duration) and its sheets <id>.sb_{i}.webp (jpg, png) as
they were downloaded. The folder is searched with all folders in it.

yt-dlp: for every <name>.info.json its <name>.mhtml and <name>.en.json3 (vtt, srt), as left by
  yt-dlp -f sb0 --write-info-json --write-subs --write-auto-subs --sub-langs en --sub-format json3/vtt ...
Emu: for every <key>.json its sheets <key>_{i}.webp; give --transcripts and --labels as well.

example: python -m data_pipelines.prepare.storyboard downloads --out shards/yt_storyboard
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from conf import UserError, run_cli
from data_pipelines.prepare.commands import make_parser, print_report, read_task
from data_pipelines.prepare.emu_files import EmuFolders, load_emu
from data_pipelines.prepare.jobs import Entry, Input, make_shards, split_inputs
from data_pipelines.prepare.safe_files import is_plain_name
from data_pipelines.prepare.ytdlp_files import SUFFIX, load_ytdlp


def main() -> None:
    arguments = _parse_arguments()
    task = read_task(arguments)
    _check_arguments(arguments)
    settings = {
        "command": "storyboard",
        "samples_per_shard": arguments.samples_per_shard,
        "folder": str(arguments.folder.resolve()),
        "language": arguments.language,
        "transcripts": str(arguments.transcripts),
        "labels": str(arguments.labels),
    }
    source = Input("yt_sb", "", partial(_read_entries, arguments))
    if not any(True for _ in source.entries()):
        raise UserError(f"{arguments.folder} holds no {_wanted(arguments)}: name the folder of the downloads")
    parts = split_inputs([source], arguments.samples_per_shard, task)
    report = make_shards(arguments.out, settings, parts, unit="videos", total=None)
    print_report(report, arguments.out, kind="storyboard", unit="videos", task=task)


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser("storyboard", __doc__, samples_per_shard=1000)
    parser.add_argument("folder", type=Path, help="folder of the downloads")
    parser.add_argument("--language", default="en", help="of the subtitles (default %(default)s)")
    parser.add_argument("--transcripts", type=Path, help="Emu's files: folder of <video id>.json with subtitles")
    parser.add_argument("--labels", type=Path, help="Emu's files: folder of <video id>.json with the duration")
    return parser.parse_args()


def _check_arguments(arguments: argparse.Namespace) -> None:
    if (arguments.transcripts is None) != (arguments.labels is None):
        raise UserError("Emu's files need both --transcripts and --labels: give both, or none for yt-dlp's files")
    for folder in (arguments.folder, arguments.transcripts, arguments.labels):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is no folder: name one that exists")
    if not is_plain_name(arguments.language):
        raise UserError(f"--language {arguments.language!r} is no language code: give one such as en")


def _wanted(arguments: argparse.Namespace) -> str:
    return f"*{SUFFIX}" if arguments.labels is None else "<key>.json of Emu's tools"


def _read_entries(arguments: argparse.Namespace) -> Iterator[Entry]:
    """Videos in the order of their folders and names; only one folder's names are held at a time."""
    passed_over = {folder.resolve() for folder in (arguments.transcripts, arguments.labels) if folder}
    for place, folders, names in os.walk(arguments.folder):
        folder = Path(place)
        folders[:] = sorted(name for name in folders if (folder / name).resolve() not in passed_over)
        for name in sorted(names):
            if not _is_record(name, arguments):
                continue
            yield Entry((folder / name).relative_to(arguments.folder).as_posix(), _loader(folder, name, arguments))


def _is_record(name: str, arguments: argparse.Namespace) -> bool:
    if arguments.labels is None:
        return name.endswith(SUFFIX)
    return name.endswith(".json") and not name.endswith((SUFFIX, "_stats.json"))


def _loader(folder: Path, name: str, arguments: argparse.Namespace) -> Callable:
    if arguments.labels is None:
        return partial(load_ytdlp, folder, name, arguments.language)
    folders = EmuFolders(arguments.transcripts, arguments.labels)
    return partial(load_emu, folder, name, folders, arguments.language)


if __name__ == "__main__":
    run_cli(main)
