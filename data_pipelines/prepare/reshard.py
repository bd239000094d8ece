"""Cut tars that are too large, or join those that are too small, into shards of the size that you want.

Takes the tars of any WebDataset. Samples keep their keys, their members' names and bytes, and their order. Links and
folders are not taken along; what is damaged is left out and listed in defects.txt.

example: python -m data_pipelines.prepare.reshard 'laion/{00000..41407}.tar' --shard-mb 1000 --out shards/laion
"""

from __future__ import annotations

import argparse
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from conf import UserError, run_cli
from data_pipelines.prepare.commands import make_parser, print_report, read_task
from data_pipelines.prepare.jobs import Entry, Part, Task, digest_of, make_shards, open_folder
from data_pipelines.prepare.reshard_plan import DEFECTS_FILE, Plan, Segment, ShardSize, iterate_members, load_plan
from data_pipelines.prepare.shard_writer import Sample
from data_pipelines.shards import expand_shards, open_shard
from data_pipelines.sources.common import SampleError


def main() -> None:
    arguments = _parse_arguments()
    task = read_task(arguments)
    size = _wanted_size(arguments)
    settings = {
        "command": "reshard",
        "samples_per_shard": arguments.samples_per_shard,
        "shard_mb": arguments.shard_mb,
        "max_member_mb": arguments.max_member_mb,
    }
    urls = expand_shards(arguments.shards)
    open_folder(arguments.out, settings)
    plan = load_plan(arguments.out, urls, size)
    if not plan.shards:
        raise UserError(f"the tars {arguments.shards!r} hold no sample: {arguments.out / DEFECTS_FILE} says why")
    parts = list(_own_parts(plan, int(arguments.max_member_mb * 2**20), task))
    total = sum(
        segment.num_samples for number, shard in enumerate(plan.shards) if task.owns(number) for segment in shard
    )
    report = make_shards(arguments.out, settings, parts, unit="samples", total=total)
    if plan.num_defects:
        report.notes[f"damages of the tars, listed in {DEFECTS_FILE}"] = plan.num_defects
    print_report(report, arguments.out, kind="NAME", unit="samples", task=task)


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser("reshard", __doc__, samples_per_shard=None)
    parser.add_argument("shards", help="path, glob or brace pattern of the tars, in quotes")
    parser.add_argument("--shard-mb", type=float, metavar="MB", help="MiB of a shard, at most (no bound)")
    parser.add_argument("--max-member-mb", type=float, default=256.0, help="larger ones spoil a sample (%(default)s)")
    return parser.parse_args()


def _wanted_size(arguments: argparse.Namespace) -> ShardSize:
    if arguments.samples_per_shard is None and arguments.shard_mb is None:
        raise UserError("reshard needs a size: give --samples-per-shard or --shard-mb, or both")
    if arguments.shard_mb is not None and arguments.shard_mb <= 0:
        raise UserError(f"--shard-mb {arguments.shard_mb} must be positive")
    max_bytes = None if arguments.shard_mb is None else int(arguments.shard_mb * 2**20)
    return ShardSize(arguments.samples_per_shard, max_bytes)


def _own_parts(plan: Plan, max_member_bytes: int, task: Task) -> Iterator[Part]:
    for number, segments in enumerate(plan.shards):
        if task.owns(number):
            digest = digest_of(*(" ".join(map(str, segment)) for segment in segments))
            yield Part(f"{number:06d}", digest, partial(_read_entries, segments, max_member_bytes))


def _read_entries(segments: list[Segment], max_member_bytes: int) -> Iterator[Entry]:
    """Each sample must be loaded before the next is asked for: they share a stream."""
    for segment in segments:
        with open_shard(segment.url) as stream:
            members = iterate_members(stream, segment.start, segment.end)
            try:
                for key, group in groupby(members, key=itemgetter(0)):
                    infos = [info for _, info in group]
                    yield Entry(key, partial(_load_sample, key, infos, stream, max_member_bytes))
            except tarfile.TarError as error:
                raise UserError(
                    f"{segment.url} was changed while it was read: run this again in another --out"
                ) from error


def _load_sample(key: str, infos: list[Any], stream: BinaryIO, max_member_bytes: int, notes: Counter[str]) -> Sample:
    members: dict[str, bytes] = {}
    extensions = {info.name[len(key) + 1 :].lower() for info in infos}
    if len(extensions) < len(infos):
        raise SampleError("duplicate member")
    for info in infos:
        if info.size > max_member_bytes:
            raise SampleError("member too large")
        stream.seek(info.offset_data)
        members[info.name] = stream.read(info.size)
        if len(members[info.name]) != info.size:
            raise SampleError("cut off")
    return Sample(key, members)


if __name__ == "__main__":
    run_cli(main)
