"""What the index needs to know of one shard, from its tar headers alone."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from tarfile import BLOCKSIZE
from typing import BinaryIO, cast

import numpy as np

from conf import UserError
from data_pipelines.shards import fetch_range, stat_shard
from data_pipelines.stores import ShardStat, is_local, local_path
from data_pipelines.tar_samples import sample_ranges

LOCAL_BLOCK_BYTES = 1 << 13
REMOTE_BLOCK_BYTES = 1 << 22
"""A block is read from where the next header stands, so members larger than a block are stepped over and smaller ones
are read along. Over a network 4 MiB take about as long as the round trip that stepping over them would cost; on a disk
stepping is free."""
MAX_HEADER_BYTES = 1 << 20
MAX_STATS_BYTES, MAX_SIZES_BYTES = 1 << 20, 1 << 26
"""Of files beside a shard; sizes.json of a million shards has some 20 MB."""
DISAGREEMENT = re.compile(r": holds \d+ samples, but .+ beside it says -?\d+$")
"""How a line of defects.txt ends that tells of a disagreement; the other lines tell of damage."""


@dataclass
class ShardScan:
    """One scanned shard.

    cuts: uint32 [chunks, 4]: first 512-byte block, number of blocks, first sample and number of samples of each chunk.
    defects: what was left out. disagreements: what is said beside the shard about its number of samples but is not so.
    """

    url: str
    stat: ShardStat
    cuts: np.ndarray
    defects: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return int(self.cuts[:, 3].sum())


def scan_shard(url: str, chunk_samples: int, chunk_bytes: int) -> ShardScan:
    """Where the chunks of a shard stand: at most `chunk_samples` samples and `chunk_bytes`, or a single larger sample.

    Raises UserError when the shard is missing or cannot be read; damage inside is noted.
    """
    stat = stat_shard(url)
    if stat.size > BLOCKSIZE << 32:
        raise UserError(f"the shard {url} is larger than 2 TiB: split it with python -m data_pipelines.prepare.reshard")
    defects: list[str] = []
    with closing(_open_blocks(url, stat)) as blocks:
        ranges = sample_ranges(cast(BinaryIO, blocks), stat.size, defects)
        cuts = np.fromiter(_cut(ranges, chunk_samples, chunk_bytes), np.dtype((np.uint32, 4)))
    scan = ShardScan(url, stat, cuts, defects)
    scan.disagreements += _disagreements(url, scan.num_samples)
    return scan


def _cut(
    ranges: Iterator[tuple[int, int]], chunk_samples: int, chunk_bytes: int
) -> Iterator[tuple[int, int, int, int]]:
    """Chunks of consecutive samples; a sample that was left out is a gap, which no chunk may hold."""
    first, count, start, end = 0, 0, 0, 0
    for sample_start, sample_end in ranges:
        full = count == chunk_samples or sample_end - start > chunk_bytes or sample_start != end
        if count and full:
            yield start // BLOCKSIZE, (end - start) // BLOCKSIZE, first, count
            first, count = first + count, 0
        if not count:
            start = sample_start
        count, end = count + 1, sample_end
    if count:
        yield start // BLOCKSIZE, (end - start) // BLOCKSIZE, first, count


def _open_blocks(url: str, stat: ShardStat) -> _BlockStream:
    if not is_local(url):
        return _BlockStream(partial(_fetch, url, stat), stat.size, REMOTE_BLOCK_BYTES)
    try:
        file = os.open(local_path(url), os.O_RDONLY)
    except OSError as error:
        raise UserError(f"the shard {url} cannot be read ({error.strerror}): restore it") from error
    read = lambda offset, nbytes: os.pread(file, nbytes, offset)  # noqa: E731
    return _BlockStream(read, stat.size, LOCAL_BLOCK_BYTES, partial(os.close, file))


def _fetch(url: str, stat: ShardStat, offset: int, nbytes: int) -> bytes:
    fetched = fetch_range(url, offset, nbytes)
    if fetched.stat != stat or len(fetched.data) != nbytes:
        raise UserError(f"the shard {url} was replaced while it was scanned: scan it again when it is whole")
    return fetched.data


class _BlockStream:
    """The seekable stream that tarfile asks for, over byte ranges; it holds one block at a time.

    Raises tarfile.ReadError for a read that no honest header needs: tarfile reads as much as a header says.
    """

    def __init__(
        self, read: Callable[[int, int], bytes], size: int, block_bytes: int, close: Callable[[], None] = lambda: None
    ) -> None:
        self._read, self._size, self._block_bytes = read, size, block_bytes
        self.close = close
        self._block, self._block_start = b"", 0
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, nbytes: int) -> bytes:
        if not 0 <= nbytes <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {nbytes} bytes")
        nbytes = min(nbytes, self._size - self._position)
        if nbytes <= 0:
            return b""
        begin = self._position - self._block_start
        if not 0 <= begin <= len(self._block) - nbytes:
            wanted = min(max(nbytes, self._block_bytes), self._size - self._position)
            self._block, self._block_start, begin = self._read(self._position, wanted), self._position, 0
        self._position += nbytes
        return self._block[begin : begin + nbytes]


def _disagreements(url: str, num_samples: int) -> list[str]:
    """Where files beside the shard count other samples; they may be of another run, so the tar alone is believed."""
    told = {}
    if "?" not in url:  # a signed url opens nothing but itself
        folder, slash, name = url.rpartition("/")
        stats = f"{name.removesuffix('.tar')}_stats.json"
        told = {stats: _told_by_stats(folder + slash + stats), "sizes.json": _sizes(folder + slash).get(name)}
    return [
        f"holds {num_samples} samples, but {file} beside it says {count}"
        for file, count in told.items()
        if type(count) is int and count != num_samples
    ]


def _told_by_stats(url: str) -> object:
    """img2dataset writes only what succeeded; video2dataset, which subsamples, writes failures too."""
    stats = _read_json(url, MAX_STATS_BYTES)
    return stats.get("count" if "failed_to_subsample" in stats else "successes")


@lru_cache(maxsize=4)
def _sizes(folder: str) -> dict:
    return _read_json(f"{folder}sizes.json", MAX_SIZES_BYTES)


def _read_json(url: str, max_bytes: int) -> dict:
    """A JSON object, or {} where there is none: nothing depends on it."""
    try:
        data = fetch_range(url, 0, max_bytes).data
        read = json.loads(data) if len(data) < max_bytes else {}
    except (UserError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}
