"""Building the index of a corpus from the headers of its tars."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from conf import UserError
from data_pipelines.index import CHUNK_FIELDS, FORMAT_VERSION, SHARD_FIELDS, Chunk, Index, open_index
from data_pipelines.shards import expand_shards, is_local, open_shard, stat_shard
from data_pipelines.tar_samples import scan_samples

log = logging.getLogger(__name__)


def build_index(source: str, pattern: str, out: str | Path, *, chunk_samples: int = 64, chunk_mb: float = 4.0) -> Index:
    """Index the shards of `pattern` into the folder `out`, which appears only when it is complete.

    A chunk holds at most `chunk_samples` samples and `chunk_mb` MiB, or a single larger sample. Damaged shards are
    indexed as far as they are whole, with a warning. An index that stands at `out` is replaced.

    Raises UserError when no shard or no sample is found, a shard is missing, or `out` is another kind of folder.
    """
    out = Path(out)
    if out.exists() and not (out / "index.json").exists():
        raise UserError(f"{out} exists and is no index: choose another folder for it")
    tables = _Tables(source, pattern, chunk_samples, int(chunk_mb * 2**20))
    for url in tqdm(expand_shards(pattern), desc=f"index {source}", unit="shard", disable=None):
        tables.add_shard(url)
    if not tables.chunks:
        raise UserError(f"the shards {pattern!r} hold no sample: they must be tars of WebDataset samples")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        tables.write(temporary)
        _replace(out, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_index(out)


def _replace(out: Path, temporary: Path) -> None:
    """A folder cannot be renamed onto another one: the old index steps aside first."""
    if out.exists():
        retired = out.with_name(f"{out.name}.old-{os.getpid()}")
        out.rename(retired)
        temporary.rename(out)
        shutil.rmtree(retired)
    else:
        temporary.rename(out)


class _Tables:
    """The index while it grows, shard by shard."""

    def __init__(self, source: str, pattern: str, chunk_samples: int, chunk_bytes: int) -> None:
        self.source, self.pattern = source, pattern
        self.chunk_samples, self.chunk_bytes = chunk_samples, chunk_bytes
        self.urls: list[str] = []
        self.shards: list[tuple[int, ...]] = []
        self.chunks: list[Chunk] = []
        self.defects: list[str] = []
        self._url_start = 0

    def add_shard(self, url: str) -> None:
        stat = stat_shard(url)
        with open_shard(url) as stream:
            found = scan_samples(stream, stat.size)
        for defect in found.defects:
            log.warning("%s: %s (%d samples before it are used)", url, defect, len(found.ranges))
            self.defects.append(f"{url}: {defect}")
        nbytes = len(_encode(url))
        self.shards.append((self._url_start, nbytes, *stat, len(found.ranges), len(self.chunks)))
        self.chunks.extend(self._chunks_of(len(self.urls), found.ranges))
        self.urls.append(url)
        self._url_start += nbytes + 1

    def _chunks_of(self, shard: int, ranges: list[tuple[int, int]]) -> Iterator[Chunk]:
        first = 0
        for number in range(1, len(ranges) + 1):
            begin, end = ranges[first][0], ranges[number - 1][1]
            if number < len(ranges):
                next_begin, next_end = ranges[number]
                gap = next_begin != end  # a sample was left out here, which no chunk may hold
                if number - first < self.chunk_samples and next_end - begin <= self.chunk_bytes and not gap:
                    continue
            yield Chunk(shard, begin, end - begin, first, number - first)
            first = number

    def write(self, folder: Path) -> None:
        np.save(folder / "shards.npy", np.array(self.shards, SHARD_FIELDS))
        np.save(folder / "chunks.npy", np.array(self.chunks, CHUNK_FIELDS))
        (folder / "urls.txt").write_bytes(b"".join(_encode(url) + b"\n" for url in self.urls))
        (folder / "defects.txt").write_bytes(b"".join(_encode(defect) + b"\n" for defect in self.defects))
        (folder / "index.json").write_text(json.dumps(self._header(), indent=1) + "\n")

    def _header(self) -> dict:
        return {
            "format": FORMAT_VERSION,
            "source": self.source,
            "pattern": self.pattern,
            "chunk_samples": self.chunk_samples,
            "chunk_mb": self.chunk_bytes / 2**20,
            "num_shards": len(self.shards),
            "num_chunks": len(self.chunks),
            "num_samples": sum(chunk.num_samples for chunk in self.chunks),
            "max_chunk_samples": max(chunk.num_samples for chunk in self.chunks),
            "num_defects": len(self.defects),
            "fingerprint": self._fingerprint(),
        }

    def _fingerprint(self) -> str:
        """sha256 over the shards' names within the corpus, sizes and chunks: not over times or where the corpus is."""
        folder = os.path.commonpath([Path(url).parent for url in self.urls]) if all(map(is_local, self.urls)) else ""
        names = [os.path.relpath(url, folder) if folder else url for url in self.urls]
        digest = hashlib.sha256(json.dumps([names, [size for _, _, size, *_ in self.shards]]).encode("ascii"))
        digest.update(np.array(self.chunks, CHUNK_FIELDS).tobytes())
        return digest.hexdigest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
