"""The three ways to get pictures that the data benchmark compares. Each returns pictures/s, from its first batch on."""

from __future__ import annotations

import functools
import io
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
import PIL.Image
import psutil
import simplejpeg
import torch
import webdataset
from torch.utils.data import DataLoader

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Document, Frame, Image
from data_pipelines.images import decode_rgb, resize_to_square
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.pictures import blank_images
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.video import frame_index

IMAGE_SIZE, NUM_QUERIES, NUM_FRAMES = 224, 32, 8
BATCH_SIZE, SHUFFLE_BUFFER = 64, 1000
ROW_PICTURES = DataConfig.max_images_per_row
MEGABYTE = 1e6


@dataclass(frozen=True)
class Corpus:
    """Shards folder/*.tar of a kind, and how many of their pictures are wanted (the shards repeat)."""

    name: str
    kind: str
    folder: Path
    tokenizer: Path
    index_dir: Path
    num_pictures: int

    def config(self, num_workers: int) -> DataConfig:
        options = {"frame_choice": "centre"} if self.kind == "webvid" else {}
        source = SourceConfig(kind=self.kind, shards=str(self.folder / "*.tar"), options=options)
        return DataConfig(
            sources={self.name: source},
            tokenizer=str(self.tokenizer),
            index_dir=str(self.index_dir),
            lanes=num_workers,
            global_batch_rows=num_workers,
            window_rows=16,
            num_workers=num_workers,
        )


def measure_ours(corpus: Corpus, num_workers: int, memory: list[tuple[float, float]]) -> float:
    config = corpus.config(num_workers)
    indexes = open_indexes(config, build_missing=True)
    tokenizer = Tokenizer(config.tokenizer)
    loader = Loader(config, indexes, tokenizer, num_queries=NUM_QUERIES, image_size=IMAGE_SIZE, dp_rank=0, dp_size=1)
    batches = iter(loader)
    next(batches)
    begin, count = time.perf_counter(), 0
    while count < corpus.num_pictures:
        count += len(next(batches).images)
    seconds = time.perf_counter() - begin
    memory.append(_largest_child())
    batches.close()  # type: ignore[attr-defined]
    return count / seconds


def _largest_child() -> tuple[float, float]:
    """Unique and proportional memory of the largest child, in MB."""
    sizes = [child.memory_full_info() for child in psutil.Process().children()]
    return max((size.uss / MEGABYTE, size.pss / MEGABYTE) for size in sizes)


def measure_webdataset(corpus: Corpus, num_workers: int) -> float:
    """As webdataset's and open_clip's own examples go: a batch is made in the worker."""
    tokenizer = Tokenizer(corpus.tokenizer)
    dataset = (
        webdataset.WebDataset(sorted(map(str, corpus.folder.glob("*.tar"))), shardshuffle=100, seed=0)
        .repeat()
        .shuffle(SHUFFLE_BUFFER)
        .decode("pilrgb", handler=webdataset.ignore_and_continue)
        .to_tuple("jpg", "txt", handler=webdataset.ignore_and_continue)
        .map_tuple(resize_with_pillow, functools.partial(_encode, tokenizer))
        .batched(BATCH_SIZE, collation_fn=_stack)
    )
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=num_workers))
    next(batches)
    begin, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
        if count >= corpus.num_pictures // 2:  # it is slow enough for a good measurement
            break
    return count / (time.perf_counter() - begin)


def resize_with_pillow(image: PIL.Image.Image) -> torch.Tensor:
    resized = image.resize((IMAGE_SIZE, IMAGE_SIZE), PIL.Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode([text])[0]


def _stack(samples: list[tuple[torch.Tensor, list[int]]]) -> tuple[torch.Tensor, list[list[int]]]:
    images, texts = zip(*samples, strict=True)
    return torch.stack(images), list(texts)


def measure_bare(corpus: Corpus, num_workers: int) -> float:
    """Processes that do nothing but decode and resize what they hold in memory."""
    decode: Callable[[bytes], list[np.ndarray]] = decode_clip if corpus.kind == "webvid" else decode_jpeg
    per_file = NUM_FRAMES if corpus.kind == "webvid" else 1
    files = _files(corpus)
    each = -(-corpus.num_pictures // per_file // num_workers)
    context = multiprocessing.get_context("fork")
    begin = time.perf_counter()
    workers = [
        context.Process(target=_decode_all, args=(decode, files[number::num_workers], each))
        for number in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return each * per_file * num_workers / (time.perf_counter() - begin)


def _decode_all(decode: Callable[[bytes], list[np.ndarray]], files: list[bytes], count: int) -> None:
    """Rows of as many pictures as ours have: pixels must end up somewhere."""
    torch.set_num_threads(1)
    position = ROW_PICTURES
    for encoded in itertools.islice(itertools.cycle(files), count):
        for pixels in decode(encoded):
            if position == ROW_PICTURES:
                row, position = blank_images(ROW_PICTURES, IMAGE_SIZE), 0
            row[position] = pixels
            position += 1


def decode_jpeg(encoded: bytes) -> list[np.ndarray]:
    """The least work that gives our pixels."""
    if encoded.startswith(b"\xff\xd8"):
        height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
        if min(height, width) < 3 * IMAGE_SIZE:
            return [resize_to_square(simplejpeg.decode_jpeg(encoded, "RGB"), IMAGE_SIZE)]
    return [resize_to_square(decode_rgb(encoded, 10**9, IMAGE_SIZE), IMAGE_SIZE)]


def decode_clip(encoded: bytes) -> list[np.ndarray]:
    reader = decord.VideoReader(io.BytesIO(encoded), num_threads=1)
    numbers = [frame_index(Frame(encoded, slot, NUM_FRAMES), len(reader)) for slot in range(NUM_FRAMES)]
    return [resize_to_square(rgb, IMAGE_SIZE) for rgb in reader.get_batch(numbers).asnumpy()]


@functools.cache
def _files(corpus: Corpus) -> list[bytes]:
    """Every picture or video of the corpus that can be used."""
    return list(itertools.islice(_encoded_files(corpus), corpus.num_pictures))


def _encoded_files(corpus: Corpus) -> Iterator[bytes]:
    config = corpus.config(1)
    index = open_indexes(config, build_missing=True)[corpus.name]
    reader = SourceReader(corpus.name, config, index)
    for chunk in range(index.num_chunks):
        for key, sample in reader.samples(chunk):
            document = reader.document(key, 0, sample)
            if isinstance(document, Document):
                picture = next(e for e in document.elements if isinstance(e, (Image, Frame)))
                yield picture.video if isinstance(picture, Frame) else picture.encoded


def sample_files(corpus: Corpus, count: int) -> list[bytes]:
    files = _files(corpus)
    return files[:: max(1, len(files) // count)]
