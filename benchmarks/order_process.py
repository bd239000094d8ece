"""What `benchmarks.order` measures, each in a process of its own; prints a line of JSON."""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import fsspec
import webdataset
from webdataset.gopen import gopen_schemes

from benchmarks.order import DP_SIZE
from benchmarks.order_corpus import CHUNK_SAMPLES, SyntheticFileSystem, chunk, url_of
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Cursor, SampleKey
from data_pipelines.index import Index, open_index
from data_pipelines.lane import first_cursor
from data_pipelines.loader import Loader
from data_pipelines.order import Units
from data_pipelines.tokenizer import Tokenizer

LANES = 8192
DP_RANK = DP_SIZE - 1
"""The last rank: its lanes begin with the longest windows."""
CHUNKS_PER_WINDOW = 43
NUM_QUERIES, IMAGE_SIZE = 32, 224
PEER_SHUFFLE = 1000
PEER_SECONDS = 3.0


def measure(ready: Callable[[], object]) -> dict:
    """Seconds of a call, and by how many megabytes the resident memory was at most larger during it than before."""
    chunk()  # the storage is not measured
    before = _reset_peak_kb()
    began = time.perf_counter()
    ready()
    return {"seconds": time.perf_counter() - began, "megabytes": round((_peak_kb() - before) * 1024 / 1e6)}


def _reset_peak_kb() -> int:
    """Resident memory now, which becomes the peak so far where the kernel lets it be set."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _peak_kb()


def _peak_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def first_keys(folder: Path, position: float) -> list[SampleKey]:
    """What a rank does from its start, or from a checkpoint, to its first row."""
    config = DataConfig(
        sources={"laion": SourceConfig(kind="laion", shards=url_of(0))},
        tokenizer=str(folder / "tokenizer.model"),
        lanes=LANES,
        global_batch_rows=LANES,
        num_workers=0,
    )
    index = open_index(folder / "index")
    loader = Loader(
        config,
        {"laion": index},
        Tokenizer(config.tokenizer),
        num_queries=NUM_QUERIES,
        image_size=IMAGE_SIZE,
        dp_rank=DP_RANK,
        dp_size=DP_SIZE,
        cursors={lane: cursor_at(position, lane, index, config) for lane in range(LANES)},
    )
    return next(iter(loader)).keys[0]


def cursor_at(position: float, lane: int, index: Index, config: DataConfig) -> Cursor:
    """Where a lane stands when that share of an epoch is over."""
    if not position:
        return first_cursor(lane, 1)
    rounds = int(position * Units(index, "laion", config.seed, LANES).num_units) // LANES
    return Cursor(window=rounds // CHUNKS_PER_WINDOW, row=0, sources=((rounds * LANES + lane, 0),))


def measure_rank(folder: Path, position: float) -> dict:
    fsspec.register_implementation("synthetic", SyntheticFileSystem)
    SyntheticFileSystem.shard_bytes = int((folder / "index" / "shard_bytes").read_text())
    keys: list[SampleKey] = []
    measured = measure(lambda: keys.extend(first_keys(folder, position)))
    assert keys, "a row holds samples"
    return measured


def measure_webdataset(num_shards: int) -> dict:
    """Seconds and megabytes to its first sample, then samples a second without decoding anything."""
    shard = chunk() * 10
    gopen_schemes["synthetic"] = lambda url, mode="rb", bufsize=8192: io.BytesIO(shard)
    samples = []

    def begin() -> None:
        urls = f"synthetic://corpus/{{000000..{num_shards - 1:06d}}}.tar"
        dataset = webdataset.WebDataset(urls, shardshuffle=num_shards).shuffle(PEER_SHUFFLE)
        samples.append(iter(dataset))
        next(samples[0])

    measured = measure(begin)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < PEER_SECONDS:
        count += sum(1 for _ in islice(samples[0], CHUNK_SAMPLES))
    return measured | {"samples_per_second": count / (time.perf_counter() - began)}


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "rank":
        measured = measure_rank(Path(arguments[0]), float(arguments[1]))
    else:
        measured = measure_webdataset(int(arguments[0]))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
