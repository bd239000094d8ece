"""Small corpora for the tests of order, lanes and loader: tars by webdataset's own writer, pictures of a few pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from webdataset import TarWriter

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.loader import open_indexes

NUM_QUERIES = 4
IMAGE_SIZE = 8
WORDS = [
    "a",
    "big",
    "small",
    "red",
    "blue",
    "green",
    "square",
    "circle",
    "stands",
    "left",
    "of",
    "above",
    "the",
    "under",
]


def encode_picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def sentence(seed: int, max_words: int = 12) -> str:
    rng = np.random.default_rng(seed)
    return f"{seed} " + " ".join(rng.choice(WORDS, rng.integers(1, max_words)))


def write_tar(path: Path, samples: list[dict[str, Any]]) -> Path:
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def write_pairs(path: Path, first: int, count: int) -> Path:
    """Every 7th sample has an empty caption; of every 11th the picture's header is right but its data are cut off."""
    samples = []
    for i in range(first, first + count):
        picture = encode_picture(i)
        caption = "" if i % 7 == 3 else sentence(i)
        samples.append({"__key__": f"{i:06d}", "png": picture[: 60 if i % 11 == 5 else None], "txt": caption})
    return write_tar(path, samples)


def write_texts(path: Path, first: int, count: int) -> Path:
    return write_tar(path, [{"__key__": f"t{i:06d}", "txt": sentence(i, 60)} for i in range(first, first + count)])


def make_config(folder: Path, tokenizer_path: Path, **changes: Any) -> DataConfig:
    """Two pairs shards of 30 and 13 samples, one text shard of 25: 3 to 1 documents."""
    write_pairs(folder / "pairs-0.tar", 0, 30)
    write_pairs(folder / "pairs-1.tar", 30, 13)
    write_texts(folder / "text-0.tar", 0, 25)
    sources = {
        "pictures": SourceConfig(kind="pairs", shards=str(folder / "pairs-*.tar"), weight=3.0, holdout=0.1),
        "words": SourceConfig(kind="text", shards=str(folder / "text-0.tar"), weight=1.0),
    }
    settings: dict[str, Any] = {
        "sources": sources,
        "tokenizer": str(tokenizer_path),
        "index_dir": str(folder / "index"),
        "seq_len": 96,
        "max_images_per_row": 5,
        "global_batch_rows": 8,
        "micro_batch_rows": 1,
        "lanes": 4,
        "window_rows": 6,
        "num_workers": 0,
        "chunk_samples": 8,
        "max_image_megapixels": 1.0,
    }
    config = DataConfig(**{**settings, **changes})
    open_indexes(config, build_missing=True)
    return config
