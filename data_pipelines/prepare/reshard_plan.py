"""Which samples go into which shard when tars are cut or joined: a list of byte ranges, made from headers alone."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from conf import UserError
from data_pipelines.prepare.jobs import digest_of
from data_pipelines.prepare.shard_writer import write_whole
from data_pipelines.shards import open_shard, stat_shard
from data_pipelines.tar_samples import member_key, scan_samples

PLAN_FILE = "plan.jsonl"
DEFECTS_FILE = "defects.txt"


class Segment(NamedTuple):
    """So many samples in bytes [start, end) of a tar, without a gap."""

    url: str
    start: int
    end: int
    num_samples: int


class ShardSize(NamedTuple):
    """The largest shard that is wanted; None = no bound. A single larger sample makes a shard of its own."""

    max_samples: int | None
    max_bytes: int | None

    def holds(self, num_samples: int, nbytes: int) -> bool:
        return not (
            (self.max_samples is not None and num_samples > self.max_samples)
            or (self.max_bytes is not None and nbytes > self.max_bytes)
        )


class Plan(NamedTuple):
    """shards: the segments of each new shard, in order; num_defects: damages of the tars, listed in a file."""

    shards: list[list[Segment]]
    num_defects: int


def load_plan(out: Path, urls: list[str], size: ShardSize) -> Plan:
    """The plan in `out`, made if it is not there yet. Raises UserError when it was made for other tars."""
    fingerprint = digest_of(*(f"{url} {stat_shard(url).size}" for url in urls))
    path = out / PLAN_FILE
    if not path.exists():
        defects: list[str] = []
        shards = list(_fill_shards(_scan(urls, defects), size))
        write_whole(out / DEFECTS_FILE, "".join(f"{defect}\n" for defect in defects))
        lines = [{"fingerprint": fingerprint, "num_defects": len(defects)}, *shards]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    header, *shards = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    if header["fingerprint"] != fingerprint:
        raise UserError(f"the tars are others than those that {path} was made for: remove {out} or change --out")
    return Plan([[Segment(*segment) for segment in shard] for shard in shards], header["num_defects"])


class _Found(NamedTuple):
    """One sample. follows: it stands right behind the sample before it; key: only where a tar begins or ends."""

    url: str
    start: int
    end: int
    follows: bool
    key: str | None


def _scan(urls: list[str], defects: list[str]) -> Iterator[_Found]:
    for url in tqdm(urls, desc="look at the tars", unit=" tar", disable=None, mininterval=0.5):
        with open_shard(url) as stream:
            found = scan_samples(stream, stat_shard(url).size)
            defects.extend(f"{url}: {defect}" for defect in found.defects)
            last = len(found.ranges) - 1
            for number, (start, end) in enumerate(found.ranges):
                key = _key_at(stream, start) if number in (0, last) else None
                yield _Found(url, start, end, number > 0 and found.ranges[number - 1][1] == start, key)


def _key_at(stream: BinaryIO, start: int) -> str | None:
    return next((key for key, _ in iterate_members(stream, start, start + 1)), None)


def iterate_members(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """(key, header) of the members of samples that begin within bytes [start, end) of a tar."""
    stream.seek(start)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        info = tar.next()
        while info is not None:
            tar.members = []  # type: ignore[attr-defined] # else the headers of a large shard pile up
            key = member_key(info)
            if key is not None:
                yield key, info
            info = tar.next() if tar.offset < end else None  # behind the end there may be damage


def _fill_shards(samples: Iterator[_Found], size: ShardSize) -> Iterator[list[Segment]]:
    shard: list[Segment] = []
    num_samples = nbytes = 0
    key_before = None
    for sample in samples:
        length = sample.end - sample.start
        # Neighbours of one key, from two tars, would be read as one sample.
        same_key = sample.key is not None and sample.key == key_before
        if shard and (same_key or not size.holds(num_samples + 1, nbytes + length)):
            yield shard
            shard, num_samples, nbytes = [], 0, 0
        _append(shard, sample)
        num_samples, nbytes, key_before = num_samples + 1, nbytes + length, sample.key
    if shard:
        yield shard


def _append(shard: list[Segment], sample: _Found) -> None:
    if shard and sample.follows and shard[-1].url == sample.url:
        last = shard[-1]
        shard[-1] = last._replace(end=sample.end, num_samples=last.num_samples + 1)
    else:
        shard.append(Segment(sample.url, sample.start, sample.end, 1))
