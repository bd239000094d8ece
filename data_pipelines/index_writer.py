"""The tables of an index, written shard by shard: nothing that grows with the number of chunks is held."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipelines.index import CHUNK_FIELDS, FORMAT_VERSION, SHARD_FIELDS, etag_hash
from data_pipelines.shard_scan import BLOCKSIZE, ShardScan


@dataclass(frozen=True)
class IndexSettings:
    """What an index is asked for, and how it can be asked for again."""

    source: str
    patterns: list[str]
    chunk_samples: int
    chunk_mb: float


@dataclass
class IndexCounts:
    num_shards: int
    num_chunks: int
    num_samples: int = 0
    max_chunk_samples: int = 0
    num_defects: int = 0
    num_disagreements: int = 0
    fingerprint: str = ""


def write_index(
    folder: Path, settings: IndexSettings, sizes: dict[str, int], num_chunks: int, scans: Iterable[ShardScan]
) -> None:
    """Fill `folder` with an index.

    sizes: url -> bytes; scans: of the same shards in the same order, with `num_chunks` chunks in all.
    """
    counts = IndexCounts(len(sizes), num_chunks)
    shards = np.zeros(counts.num_shards, SHARD_FIELDS)
    digest = _begin_fingerprint(sizes)
    url_start = first_chunk = 0
    with (
        (folder / "chunks.npy").open("wb") as chunk_file,
        (folder / "urls.txt").open("wb") as url_file,
        (folder / "defects.txt").open("wb") as defect_file,
    ):
        shape = {"descr": np.lib.format.dtype_to_descr(CHUNK_FIELDS), "fortran_order": False, "shape": (num_chunks,)}
        np.lib.format.write_array_header_1_0(chunk_file, shape)
        for shard, scan in enumerate(scans):
            chunk_file.write(_chunk_rows(shard, scan.cuts).tobytes())
            digest.update(_fingerprint_rows(shard, scan.cuts).tobytes())
            url, stat = _encode(scan.url), scan.stat
            place = (url_start, len(url), scan.num_samples, stat.size, stat.mtime_ns, etag_hash(stat), first_chunk)
            shards[shard] = place
            url_file.write(url + b"\n")
            defect_file.writelines(_encode(f"{scan.url}: {line}\n") for line in scan.defects + scan.disagreements)
            url_start, first_chunk = url_start + len(url) + 1, first_chunk + len(scan.cuts)
            _count(counts, scan)
    assert first_chunk == num_chunks
    np.save(folder / "shards.npy", shards)
    counts.fingerprint = digest.hexdigest()
    header = {"format": FORMAT_VERSION, **asdict(settings), **asdict(counts)}
    (folder / "index.json").write_text(json.dumps(header, indent=1) + "\n")


def _count(counts: IndexCounts, scan: ShardScan) -> None:
    counts.num_samples += scan.num_samples
    counts.max_chunk_samples = max(counts.max_chunk_samples, int(scan.cuts[:, 3].max(initial=0)))
    counts.num_defects += len(scan.defects)
    counts.num_disagreements += len(scan.disagreements)


def _chunk_rows(shard: int, cuts: np.ndarray) -> np.ndarray:
    """The number of samples is left out: the next chunk tells it, or the shard."""
    rows = np.empty(len(cuts), CHUNK_FIELDS)
    rows["shard"] = shard
    rows["first_block"], rows["num_blocks"], rows["first_sample"] = cuts[:, 0], cuts[:, 1], cuts[:, 2]
    return rows


def _begin_fingerprint(sizes: dict[str, int]) -> hashlib._Hash:
    """sha256 over the shards' names within the corpus, sizes and chunks: not over times or where the corpus is."""
    return hashlib.sha256(json.dumps([names_within(list(sizes)), list(sizes.values())]).encode("ascii"))


def _fingerprint_rows(shard: int, cuts: np.ndarray) -> np.ndarray:
    """int64 [chunks, 5]: shard, first byte, bytes, first sample, samples; whatever the table's own fields are."""
    rows = np.empty((len(cuts), 5), "<i8")
    rows[:, 0], rows[:, 1:] = shard, cuts
    rows[:, 1:3] *= BLOCKSIZE
    return rows


def names_within(urls: list[str]) -> list[str]:
    """The urls without the longest folder that they all lie in, files or not."""
    folders = [url.split("/")[:-1] for url in (min(urls), max(urls))]  # what the ends share, all between them share
    common = 0
    while common < min(map(len, folders)) and folders[0][common] == folders[1][common]:
        common += 1
    return [url.split("/", common)[-1] for url in urls]


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
