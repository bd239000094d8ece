"""The index of a corpus: where its chunks stand, so that any sample is one seek away.

A chunk is a run of whole samples of one shard. The index is a folder, memory-mapped, so that nothing depends on the
number of samples when it is opened:

    index.json    format, counts, chunk settings, fingerprint
    shards.npy    per shard: its url's place in urls.txt, size, mtime, samples, first chunk
    chunks.npy    per chunk: shard, byte range, first sample in the shard, samples
    urls.txt      the urls, one a line
    defects.txt   what was left out of damaged shards, one a line
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from conf import UserError
from data_pipelines.shards import expand_shards, is_local, stat_shard

FORMAT_VERSION = 1
CHECK_ON_OPEN = 1000
"""Up to so many shards are compared with their files when an index is opened, more of them when first read."""

SHARD_FIELDS = np.dtype(
    [(name, "<i8") for name in ("url_start", "url_nbytes", "size", "mtime_ns", "num_samples", "first_chunk")]
)
CHUNK_FIELDS = np.dtype([(name, "<i8") for name in ("shard", "offset", "nbytes", "first_sample", "num_samples")])


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
        self._header = header
        self._shards = np.load(path / "shards.npy", mmap_mode="r")
        self._chunks = np.load(path / "chunks.npy", mmap_mode="r")
        self._urls = np.memmap(path / "urls.txt", dtype=np.uint8, mode="r")
        self._checked: set[int] = set()

    def __reduce__(self) -> tuple:
        return Index, (self.path, self._header)

    def url(self, shard: int) -> str:
        start, nbytes = (int(self._shards[shard][name]) for name in ("url_start", "url_nbytes"))
        return self._urls[start : start + nbytes].tobytes().decode("utf-8", "surrogateescape")

    def chunk(self, number: int) -> Chunk:
        return Chunk(*self._chunks[number].item())

    def chunk_of(self, shard: int, sample: int) -> int:
        """Number of the chunk that holds sample number `sample` of a shard."""
        begin = int(self._shards[shard]["first_chunk"])
        end = int(self._shards[shard + 1]["first_chunk"]) if shard + 1 < self.num_shards else self.num_chunks
        return begin + int(np.searchsorted(self._chunks["first_sample"][begin:end], sample, side="right")) - 1

    def check_shard(self, shard: int) -> None:
        """Raises UserError when the shard is missing or is another file than the one that was indexed; looks once."""
        if shard in self._checked:
            return
        url, record = self.url(shard), self._shards[shard]
        stat = stat_shard(url)
        if stat.size != record["size"] or stat.mtime_ns != record["mtime_ns"]:
            self._raise_older(url)
        self._checked.add(shard)

    def check_pattern(self) -> None:
        """Raises UserError when the local pattern of the shards finds one more than were indexed."""
        indexed = {self.url(shard) for shard in range(self.num_shards)}
        try:
            found = set(expand_shards(self._header["pattern"]))
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
        return (
            f"run python -m data_pipelines.prepare.index {made['source']} '{made['pattern']}' --out {self.path} "
            f"--chunk-samples {made['chunk_samples']} --chunk-mb {made['chunk_mb']:g} again"
        )


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
    index = Index(path, header)
    if index.num_shards <= CHECK_ON_OPEN:
        for shard in range(index.num_shards):
            if is_local(index.url(shard)):
                index.check_shard(shard)
        if is_local(header["pattern"]):
            index.check_pattern()
    return index
