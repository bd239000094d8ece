"""How long a run waits for its first batch at the beginning of an epoch and at 90 % of it, local and over http.

python -m benchmarks.resume (make bench-resume): drawn pairs and texts in a temporary folder; each position in turn, a
fresh Loader every time. The peer is plain webdataset, which comes to 90 % only by reading what lies before.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import sentencepiece
import webdataset
from tqdm import tqdm

from conf import run_cli
from data_pipelines import stores
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Cursor
from data_pipelines.images import decode_rgb, resize_to_square
from data_pipelines.lane import Lane, LaneSettings, first_cursor
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines.faulty_server import FaultyServer, serving

PICTURE_SHARDS, TEXT_SHARDS, SAMPLES_PER_SHARD = 64, 64, 500
PICTURE_SIZE, NUM_PICTURES = 64, 50
NUM_QUERIES, IMAGE_SIZE, LANES = 32, 224, 8
WORDS = [
    "a",
    "big",
    "small",
    "red",
    "blue",
    "square",
    "circle",
    "stands",
    "left",
    "of",
    "above",
    "old",
    "house",
    "tree",
]
PLACES = ("local", "http")
POSITIONS = (0.0, 0.9)
MAX_RATIO, MAX_CHUNKS = 1.2, 2


def caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(4, 24)))


def make_corpus(folder: Path) -> None:
    """Shards of pairs and of texts, and a tokenizer of their words."""
    rng = np.random.default_rng(0)
    pictures = [encode_picture(rng) for _ in range(NUM_PICTURES)]
    names = [f"pairs-{i:03d}" for i in range(PICTURE_SHARDS)] + [f"text-{i:03d}" for i in range(TEXT_SHARDS)]
    for name in tqdm(names, desc="corpus", unit="shard", disable=None):
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:
            for i in range(SAMPLES_PER_SHARD):
                picture = {"jpg": pictures[rng.integers(NUM_PICTURES)]} if name.startswith("pairs") else {}
                writer.write({"__key__": f"{name}-{i:05d}", "txt": caption(rng), **picture})
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([caption(rng) for _ in range(500)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        byte_fallback=True,
        model_type="bpe",
        num_threads=1,
        minloglevel=2,
    )


def encode_picture(rng: np.random.Generator) -> bytes:
    colours = rng.integers(0, 256, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(colours).resize((PICTURE_SIZE, PICTURE_SIZE)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_config(folder: Path, base: str, place: str, arguments: argparse.Namespace) -> DataConfig:
    sources = {
        "pairs": SourceConfig("pairs", f"{base}/pairs-{{000..{PICTURE_SHARDS - 1:03d}}}.tar", weight=3.0),
        "text": SourceConfig("text", f"{base}/text-{{000..{TEXT_SHARDS - 1:03d}}}.tar", weight=1.0),
    }
    return DataConfig(
        sources,
        str(folder / "tokenizer.model"),
        str(folder / f"index-{place}"),
        seq_len=arguments.seq_len,
        global_batch_rows=LANES,
        micro_batch_rows=LANES,
        lanes=LANES,
        window_rows=arguments.window_rows,
        chunk_samples=arguments.chunk_samples,
        num_workers=arguments.workers,
    )


def lane_settings(config: DataConfig) -> LaneSettings:
    indexes = open_indexes(config, build_missing=False)
    readers = [SourceReader(name, config, index) for name, index in indexes.items()]
    return LaneSettings(config, readers, Tokenizer(config.tokenizer), NUM_QUERIES, IMAGE_SIZE, 1 << 30)


def cursors_at(config: DataConfig, position: float) -> dict[int, Cursor]:
    """Where the lanes stand after `position` of an epoch: as checkpoints have it, in the midst of a window.

    At 0 they are new.
    """
    settings = lane_settings(config)
    if not position:
        return {lane: first_cursor(lane, len(settings.readers)) for lane in range(LANES)}
    rounds = [int(position * reader.units.num_units) // LANES for reader in settings.readers]
    cursors = {}
    for number in range(LANES):
        begin = Cursor(1000, 0, tuple((LANES * r + number, 0) for r in rounds))
        lane = Lane(number, settings, begin)
        cursor = begin
        while cursor.window < begin.window + 2 or cursor.row < 2:
            cursor = lane.next_row().cursor
        cursors[number] = cursor
    return cursors


def seconds_to_first_batch(config: DataConfig, cursors: dict[int, Cursor]) -> float:
    start = time.perf_counter()
    indexes = open_indexes(config, build_missing=False)
    loader = Loader(
        config,
        indexes,
        Tokenizer(config.tokenizer),
        num_queries=NUM_QUERIES,
        image_size=IMAGE_SIZE,
        dp_rank=0,
        dp_size=1,
        cursors=cursors,
    )
    batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined] # a generator
    return seconds


def count_reads(config: DataConfig, cursors: dict[int, Cursor]) -> tuple[int, int]:
    """Bytes read before the first row of every lane, and the most chunks that one lane read of one source."""
    read, num_bytes, chunks = stores.read, 0, Counter[str]()

    def counting_read(url: str, offset: int, nbytes: int, timeout_s: float) -> stores.Fetched:
        nonlocal num_bytes
        num_bytes += nbytes
        chunks[Path(url).name.partition("-")[0]] += 1
        return read(url, offset, nbytes, timeout_s)

    most = 0
    settings = lane_settings(config)
    with mock.patch.object(stores, "read", counting_read):
        for number, cursor in cursors.items():
            chunks.clear()
            lane = Lane(number, settings, cursor)
            lane.expect_window()
            lane.next_row()
            most = max(most, *chunks.values())
    return num_bytes, most


def webdataset_seconds(folder: Path, position: float) -> float:
    """As many pictures as one batch here has, after the samples that lie before the position."""
    start = time.perf_counter()
    shards = sorted(map(str, folder.glob("pairs-*.tar")))
    samples: Iterator[dict] = iter(webdataset.WebDataset(shards, shardshuffle=False))
    num_before = int(position * PICTURE_SHARDS * SAMPLES_PER_SHARD)
    for sample in itertools.islice(samples, num_before, num_before + 24 * LANES):
        resize_to_square(decode_rgb(sample["jpg"], 1 << 24), IMAGE_SIZE)
    return time.perf_counter() - start


def measure(folder: Path, server: FaultyServer, arguments: argparse.Namespace) -> dict[str, float]:
    bases = {"local": str(folder), "http": server.url}
    configs = {place: make_config(folder, bases[place], place, arguments) for place in PLACES}
    for config in configs.values():
        open_indexes(config, build_missing=True)
    server.latency_s = arguments.latency_ms / 1000
    cursors = {position: cursors_at(configs["local"], position) for position in POSITIONS}
    reads = {position: count_reads(configs["http"], cursors[position]) for position in POSITIONS}
    tries: dict[tuple[str, float], Callable[[], float]] = {}
    for place, position in itertools.product(PLACES, POSITIONS):
        tries[place, position] = partial(seconds_to_first_batch, configs[place], cursors[position])
    for position in POSITIONS:
        tries["webdataset", position] = partial(webdataset_seconds, folder, position)
    seconds = defaultdict(list)
    for _ in tqdm(range(arguments.repeats), desc="repeats", disable=None):
        for key, attempt in tries.items():
            seconds[key].append(attempt())
    return report({key: statistics.median(values) for key, values in seconds.items()}, reads)


def report(seconds: dict[tuple[str, float], float], reads: dict[float, tuple[int, int]]) -> dict[str, float]:
    ratios = {}
    for place in (*PLACES, "webdataset"):
        early, late = (seconds[place, position] for position in POSITIONS)
        ratios[place] = late / early
        print(f"{place:11s} first batch at 0 %: {early:.3f} s, at 90 %: {late:.3f} s, ratio {late / early:.2f}")
    (early_bytes, early_chunks), (late_bytes, late_chunks) = (reads[position] for position in POSITIONS)
    print(
        f"bytes read before the first row of {LANES} lanes at 0 %: {early_bytes / 1e6:.1f} MB, "
        f"at 90 %: {late_bytes / 1e6:.1f} MB, ratio {late_bytes / early_bytes:.2f} (limit {MAX_RATIO})"
    )
    most = max(early_chunks, late_chunks)
    print(f"most chunks of a lane and source before its first row: {most} (limit {MAX_CHUNKS})")
    ratios["bytes"], ratios["chunks"] = late_bytes / early_bytes, most
    return ratios


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-resume-") as name:
        folder = Path(name)
        make_corpus(folder)
        with serving(folder) as server:
            ratios = measure(folder, server, arguments)
    print(f"ratios: local={ratios['local']:.2f} http={ratios['http']:.2f}")
    held = max(ratios["local"], ratios["http"], ratios["bytes"]) <= MAX_RATIO and ratios["chunks"] <= MAX_CHUNKS
    return 0 if held else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resume",
        description="Time to the first batch at 90 %% of an epoch over that at its beginning; exit code 1 beyond 1.2.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=7, help="medians are of so many")
    parser.add_argument("--workers", type=int, default=2, help="data.num_workers")
    parser.add_argument("--latency-ms", type=float, default=5.0, help="that the http server adds to every answer")
    parser.add_argument("--window-rows", type=int, default=4, help="data.window_rows")
    parser.add_argument("--seq-len", type=int, default=512, help="data.seq_len")
    parser.add_argument("--chunk-samples", type=int, default=500, help="data.chunk_samples")
    return run(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
