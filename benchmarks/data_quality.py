"""What the data benchmark measures besides speed: pixels against Pillow's, and how full the mixture's rows are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import decord
import numpy as np
import PIL.Image

from benchmarks.data_contenders import IMAGE_SIZE, NUM_FRAMES, NUM_QUERIES, Corpus, resize_with_pillow, sample_files
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Frame, Image, Picture
from data_pipelines.headers import DecodeError
from data_pipelines.lane import LaneSettings, fill_window, first_cursor
from data_pipelines.loader import open_indexes
from data_pipelines.packing import fill
from data_pipelines.pictures import decode_pictures
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.video import frame_index

NUM_COMPARED = 64
MIXTURE = {  # kind, set, and Emu's batch sizes, which are the weights of conf/data/corpora.yaml
    "laion": ("laion", "small", 128.0),
    "laion_coco": ("laion", "large", 128.0),
    "mmc4": ("mmc4", "pages", 64.0),
    "webvid": ("webvid", "video", 16.0),
    "storyboard": ("storyboard", "boards", 16.0),
}


def pixel_differences(corpus: Corpus) -> tuple[float, float]:
    """Mean absolute difference in 255ths, over all pictures and of the worst one."""
    files = sample_files(corpus, NUM_COMPARED // (NUM_FRAMES if corpus.kind == "webvid" else 1))
    differences = []
    for encoded in files:
        ours, expected = (_clip_pixels if corpus.kind == "webvid" else _picture_pixels)(encoded)
        differences += [
            float(np.abs(a.astype(int) - b).mean())
            for a, b in zip(ours, expected, strict=True)
            if not isinstance(a, DecodeError)
        ]
    return float(np.mean(differences)), max(differences)


def _picture_pixels(encoded: bytes) -> tuple[list, list[np.ndarray]]:
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        return _decode([Image(encoded)]), [resize_with_pillow(image.convert("RGB")).numpy()]


def _clip_pixels(encoded: bytes) -> tuple[list, list[np.ndarray]]:
    frames = [Frame(encoded, slot, NUM_FRAMES) for slot in range(NUM_FRAMES)]
    reader = decord.VideoReader(io.BytesIO(encoded), num_threads=1)
    rgb = [reader[frame_index(frame, len(reader))].asnumpy() for frame in frames]
    return _decode(frames), [resize_with_pillow(PIL.Image.fromarray(pixels)).numpy() for pixels in rgb]


def _decode(pictures: Sequence[Picture]) -> list:
    return decode_pictures(pictures, IMAGE_SIZE, 10**9)


def mixture_fill(corpora: Path, index_dir: Path) -> float:
    """Mean fill of all rows of one window of the default size."""
    sources = {
        name: SourceConfig(kind=kind, shards=str(corpora / folder / "*.tar"), weight=weight)
        for name, (kind, folder, weight) in MIXTURE.items()
    }
    tokenizer = corpora / "tokenizer.model"
    config = DataConfig(sources=sources, tokenizer=str(tokenizer), index_dir=str(index_dir), lanes=1)
    indexes = open_indexes(config, build_missing=True)
    readers = [SourceReader(name, config, index) for name, index in indexes.items()]
    settings = LaneSettings(config, readers, Tokenizer(tokenizer), NUM_QUERIES, IMAGE_SIZE, 0)
    window = fill_window(0, first_cursor(0, len(readers)), settings)
    fills = [
        fill(
            sum(len(document.input_ids) for document in row),
            sum(len(document.image_starts) for document in row),
            config.seq_len,
            config.max_images_per_row,
        )
        for row in window.rows
    ]
    return float(np.mean(fills))
