"""The index of a corpus: where its chunks stand, so that any sample is one seek away.

A chunk is a run of whole samples of one shard. The index is a folder of tables from which only what is asked for is
read, so that neither time nor memory of its readers depends on the number of samples:

    index.json    format, counts, chunk settings, fingerprint
    shards.npy    per shard: its url's place in urls.txt, samples, size, mtime, hash of its etag, first chunk
    chunks.npy    per chunk: shard, range of 512-byte blocks, first sample in the shard
    urls.txt      the urls, one a line
    defects.txt   what was left out of damaged shards, and what else is said about their sizes, one a line
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import NamedTuple, NoReturn

import numpy as np

from conf import UserError
from data_pipelines.shards import expand_shards, stat_shard
from data_pipelines.stores import ShardStat, is_local

FORMAT_VERSION = 2
CHECK_ON_OPEN = 1000
"""Up to so many shards are compared with their files when an index is opened, more of them when first read."""

SHARD_FIELDS = np.dtype(
    [
        ("url_start", "<u8"),
        ("url_nbytes", "<u4"),
        ("num_samples", "<u4"),
        ("size", "<i8"),
        ("mtime_ns", "<i8"),
        ("etag_hash", "<u8"),
        ("first_chunk", "<i8"),
    ]
)
CHUNK_FIELDS = np.dtype([(name, "<u4") for name in ("shard", "first_block", "num_blocks", "first_sample")])
"""16 bytes, for there may be 10^8 chunks; places in a tar are multiples of 512 bytes."""

VERSION_FIELDS = ["size", "mtime_ns", "etag_hash"]


class Chunk(NamedTuple):
    """Samples [first_sample, first_sample + num_samples) of a shard, in `nbytes` bytes from `offset` on."""

    shard: int
    offset: int
    nbytes: int
    first_sample: int
    num_samples: int


class Index:
    """An index that `open_index` opened. All look-ups are O(1), `chunk_of` is O(log chunks of a shard).

    fingerprint: equal for equal shards and chunks, wherever the corpus lies.
    """

    def __init__(self, path: Path, header: dict) -> None:
        self.path = path
        self.fingerprint: str = header["fingerprint"]
        self.num_shards: int = header["num_shards"]
        self.num_chunks: int = header["num_chunks"]
        self.num_samples: int = header["num_samples"]
        self.num_defects: int = header["num_defects"]
        self.max_chunk_samples: int = header["max_chunk_samples"]
        self.num_disagreements: int = header["num_disagreements"]
        self.patterns: list[str] = header["patterns"]
        self._header = header
        self._shards = _Table(path / "shards.npy", SHARD_FIELDS, self.num_shards)
        self._chunks = _Table(path / "chunks.npy", CHUNK_FIELDS, self.num_chunks)
        self._urls = _open(self, path / "urls.txt")

    def __reduce__(self) -> tuple:
        return Index, (self.path, self._header)

    def url(self, shard: int) -> str:
        (record,) = self._shards.rows(shard, shard + 1)
        url = os.pread(self._urls, int(record["url_nbytes"]), int(record["url_start"]))
        return url.decode("utf-8", "surrogateescape")

    def chunk(self, number: int) -> Chunk:
        rows = self._chunks.rows(number, min(number + 2, self.num_chunks))
        shard, first_block, num_blocks, first_sample = rows[0].item()
        if len(rows) == 2 and rows[1]["shard"] == shard:
            end = rows[1]["first_sample"]
        else:
            end = self._shards.rows(shard, shard + 1)[0]["num_samples"]
        return Chunk(shard, first_block * BLOCKSIZE, num_blocks * BLOCKSIZE, first_sample, int(end) - first_sample)

    def chunk_of(self, shard: int, sample: int) -> int:
        """Number of the chunk that holds sample number `sample` of a shard."""
        begin, *following = self._shards.rows(shard, min(shard + 2, self.num_shards))["first_chunk"].tolist()
        chunks = self._chunks.rows(begin, following[0] if following else self.num_chunks)
        return begin + int(np.searchsorted(chunks["first_sample"], sample, side="right")) - 1

    def check_shard(self, shard: int) -> None:
        """Raises UserError when the shard is missing or is another file than the one that was indexed."""
        self.check_stat(shard, stat_shard(self.url(shard)))

    def check_stat(self, shard: int, stat: ShardStat) -> None:
        """Raises UserError when `stat` is of another version of the shard than the one that was indexed."""
        size, mtime_ns, version = self.version(shard)
        etags = {version, etag_hash(stat)} - {0}
        if (stat.size, stat.mtime_ns) != (size, mtime_ns) or len(etags) == 2:
            self._raise_older(self.url(shard))

    def version(self, shard: int) -> tuple[int, int, int]:
        """Size in bytes, mtime_ns and hash of the etag of the shard that was indexed."""
        size, mtime_ns, etag = self._shards.rows(shard, shard + 1)[VERSION_FIELDS][0].item()
        return size, mtime_ns, etag

    def check_pattern(self) -> None:
        """Raises UserError when the local patterns of the shards find one more than were indexed."""
        indexed = {self.url(shard) for shard in range(self.num_shards)}
        try:
            found = {url for pattern in self.patterns for url in expand_shards(pattern)}
        except UserError:  # a relative pattern, seen from another folder
            return
        added = sorted(found - indexed)
        if added and found & indexed:  # none in common: again another folder
            self._raise_older(added[0])

    def _raise_older(self, url: str) -> NoReturn:
        raise UserError(f"the index {self.path} is older than its shard {url}: {self._build_again()}")

    def raise_unlike(self, chunk: Chunk) -> None:
        raise UserError(
            f"the shard {self.url(chunk.shard)} does not hold at byte {chunk.offset} what the index {self.path} says: "
            + self._build_again()
        )

    def _build_again(self) -> str:
        made = self._header
        patterns = " ".join(f"'{pattern}'" for pattern in self.patterns)
        return (
            f"run python -m data_pipelines.prepare.index {made['source']} {patterns} --out {self.path} "
            f"--chunk-samples {made['chunk_samples']} --chunk-mb {made['chunk_mb']:g} again"
        )


class _Table:
    """Records of an .npy file, read where they are asked for. Were it mapped into memory, every look-up would leave
    pages behind, and each process of a node would grow by the whole table.

    Raises ValueError when the file holds other records, or another number of them.
    """

    def __init__(self, path: Path, fields: np.dtype, length: int) -> None:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        if (shape, found) != ((length,), fields) or path.stat().st_size != self._start + length * fields.itemsize:
            raise ValueError(f"{path.name} is not the table of {length} records that it should be")
        self._fields = fields
        self._file = _open(self, path)

    def rows(self, first: int, end: int) -> np.ndarray:
        size = self._fields.itemsize
        return np.frombuffer(os.pread(self._file, (end - first) * size, self._start + first * size), self._fields)


def _open(owner: object, path: Path) -> int:
    """File descriptor that lives as long as its owner."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


def etag_hash(stat: ShardStat) -> int:
    """64 bits of what the storage calls this version of a shard; 0 where it tells none."""
    return int.from_bytes(hashlib.blake2b(stat.etag.encode(), digest_size=8).digest(), "little") if stat.etag else 0


def open_index(path: str | Path) -> Index:
    """Raises UserError for what is no index, and for shards that are missing, changed or new since it was built."""
    path = Path(path)
    try:
        header = json.loads((path / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no index of a corpus: run python -m data_pipelines.prepare.index NAME PATTERN --out {path}"
        ) from error
    if header.get("format") != FORMAT_VERSION:
        raise UserError(
            f"the index {path} has format {header.get('format')}, this version reads {FORMAT_VERSION}: "
            "make it again with python -m data_pipelines.prepare.index"
        )
    try:
        index = Index(path, header)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the index {path} is damaged ({error}): make it again with python -m data_pipelines.prepare.index"
        ) from error
    if index.num_shards <= CHECK_ON_OPEN:
        for shard in range(index.num_shards):
            if is_local(index.url(shard)):
                index.check_shard(shard)
        if all(map(is_local, index.patterns)):
            index.check_pattern()
    return index
