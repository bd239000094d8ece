"""How fast the configured pipeline gives rows, where its time goes, and what its workers hold."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data_pipelines.chunk_fetcher import ChunkFetcher
from data_pipelines.document import Document, SampleKey, TokenizedDocument
from data_pipelines.inspecting.settings import Opened, spread
from data_pipelines.loader import Loader
from data_pipelines.packing import tokenize_documents
from data_pipelines.pictures import decode_pictures
from data_pipelines.reader import SourceReader
from data_pipelines.tar_samples import parse_samples

STAGES = ("read", "parse", "make documents", "tokenise", "decode")
CHUNKS_PER_SOURCE = 4


@dataclass
class Speed:
    """first_batch_s: until the first rows came; the rates are those after the first windows.

    num_tokens: picture slots included, padding not. worker_mb: most memory resident at a time, shared pages included.
    stage_ms: source -> stage -> milliseconds a document.
    """

    num_workers: int
    num_rows: int
    first_batch_s: float
    seconds: float
    num_tokens: int
    num_images: int
    worker_mb: list[int]
    stage_ms: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def rows_per_s(self) -> float:
        return self.num_rows / self.seconds

    @property
    def images_per_s(self) -> float:
        return self.num_images / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def measure(opened: Opened, num_rows: int) -> Speed:
    """Time of `num_rows` rows, at least one window of each worker, and per source the time of each stage."""
    speed = measure_rows(opened, num_rows)
    for reader in tqdm(opened.readers(), desc="stages", unit=" sources", disable=None):
        speed.stage_ms[reader.name] = measure_stages(reader, opened)
    return speed


def measure_rows(opened: Opened, num_rows: int) -> Speed:
    """A worker reads one lane here: with hundreds of lanes the first rows pay for windows that last for hours."""
    settings, data = opened.settings, opened.settings.data
    lanes = max(1, data.num_workers)
    data = dataclasses.replace(data, lanes=lanes, global_batch_rows=lanes, micro_batch_rows=lanes)
    loader = Loader(
        data,
        opened.indexes,
        opened.tokenizer,
        num_queries=settings.num_queries,
        image_size=settings.image_size,
        dp_rank=0,
        dp_size=1,
    )
    others = set(children())
    begun = time.perf_counter()
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        next(batches)
        first_batch_s = time.perf_counter() - begun
        batch = next(batch for batch in batches if all(cursor.window > 0 for cursor in batch.cursors.values()))
        steady = time.perf_counter()
        wanted = -(-max(num_rows, data.window_rows * lanes) // lanes)
        with tqdm(total=wanted * lanes, desc="rows", unit=" rows", disable=None) as bar:
            num_tokens = num_images = 0
            for batch in islice(batches, wanted):
                num_tokens += int((batch.document_ids > 0).sum())
                num_images += len(batch.images)
                bar.update(lanes)
        seconds = time.perf_counter() - steady
        workers = sorted(set(children()) - others) if data.num_workers else [os.getpid()]
        memory = [peak_mb(pid) for pid in workers]
    return Speed(data.num_workers, wanted * lanes, first_batch_s, seconds, num_tokens, num_images, memory)


def children() -> list[int]:
    """Processes that this one has started; none where the system does not tell."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def peak_mb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines() if Path(f"/proc/{pid}").exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), 0)


def measure_stages(reader: SourceReader, opened: Opened) -> dict[str, float]:
    """Milliseconds a document in each stage, one after the other in this process."""
    settings, index = opened.settings, reader.index
    data = settings.data
    spent = dict.fromkeys(STAGES, 0.0)
    num_documents, fetcher = 0, ChunkFetcher(data)
    for number in spread(index.num_chunks, CHUNKS_PER_SOURCE):
        chunk = index.chunk(number)
        with timed(spent, "read"):
            encoded = fetcher.fetch(index, chunk)
        with timed(spent, "parse"):
            samples = parse_samples(encoded, int(data.max_member_mb * 2**20))
        keys = [SampleKey(reader.name, chunk.shard, chunk.first_sample + i) for i in range(len(samples))]
        with timed(spent, "make documents"):
            made = [(key, 0, reader.document(key, 0, sample)) for key, sample in zip(keys, samples, strict=True)]
        documents = [(key, epoch, document) for key, epoch, document in made if isinstance(document, Document)]
        with timed(spent, "tokenise"):
            limits = (settings.num_queries, data.seq_len, data.max_images_per_row)
            tokenized = tokenize_documents(documents, opened.tokenizer, *limits)
        whole = [document for document in tokenized if isinstance(document, TokenizedDocument)]
        with timed(spent, "decode"):
            for document in whole:
                decode_pictures(document.pictures or [], settings.image_size, int(data.max_image_megapixels * 1e6))
        num_documents += len(whole)
    return {stage: 1000 * seconds / max(1, num_documents) for stage, seconds in spent.items()}


@contextmanager
def timed(spent: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    spent[stage] += time.perf_counter() - begun


def advice(speed: Speed, num_gpus: int, tokens_per_s: float) -> str:
    """How many GPUs these workers feed, and what it takes to feed `num_gpus` that each take so many tokens a second."""
    fed = speed.tokens_per_s / tokens_per_s
    processes = max(1, speed.num_workers)
    per_gpu = math.ceil(processes / fed)
    return (
        f"{processes} processes feed {fed:.1f} GPUs at {tokens_per_s:,.0f} tokens/s each; {num_gpus} GPUs take "
        f"data.num_workers={per_gpu} and {num_gpus * per_gpu} cores for them"
    )
