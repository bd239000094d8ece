"""Small pictures, clips and samples for the tests of sources and decoding."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Document, Frame, Image, RawSample, Skip, Text
from data_pipelines.sources import Source, make_source
from data_pipelines.tar_samples import parse_samples, scan_samples


def encode(image: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(color: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    return encode(PIL.Image.new("RGB", size, color), format)


def clip(num_frames: int, size: int = 64) -> bytes:
    """mp4 whose frame k is gray 4 k: the frame's number can be read from its pixels. The index stands in front."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        _write_clip(path, num_frames, size)
        return path.read_bytes()


def _write_clip(path: Path, num_frames: int, size: int) -> None:
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("libx264", rate=10, options={"qp": "0", "g": "12", "bf": "2"})
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        for number in range(num_frames):
            gray = np.full((size, size, 3), 4 * number, dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(video.encode())


def frame_number(pixels: np.ndarray) -> int:
    return round(float(pixels.mean()) / 4)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def source(kind: str, limits: DataConfig | None = None, **options: Any) -> Source:
    return make_source("corpus", SourceConfig(kind=kind, shards="x.tar", options=options), limits or DataConfig())


def sample(name: str = "0", **members: Any) -> RawSample:
    """Members by extension, ``__`` for a dot; text and json are encoded."""
    return RawSample(name, {key.replace("__", "."): to_bytes(value) for key, value in members.items()})


def to_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def document(result: Document | Skip) -> Document:
    assert isinstance(result, Document), result
    return result


def shape(result: Document | Skip) -> str:
    """The order of elements: t = text, i = image, f = frame."""
    letters = {Text: "t", Image: "i", Frame: "f"}
    return "".join(letters[type(element)] for element in document(result).elements)


def texts(result: Document | Skip) -> list[str]:
    return [element.text for element in document(result).elements if isinstance(element, Text)]


def pictures(result: Document | Skip) -> list[Image | Frame]:
    return [element for element in document(result).elements if not isinstance(element, Text)]


def read_samples(shard: Path) -> Iterator[RawSample]:
    data = shard.read_bytes()
    for start, end in scan_samples(io.BytesIO(data), len(data)).ranges:
        yield from parse_samples(data[start:end], 1 << 28)
