"""The bytes of a corpus too large to exist: every chunk of it holds the same 64 samples, as img2dataset writes them."""

from __future__ import annotations

import io
import json
import tarfile
from functools import lru_cache
from typing import Any

import numpy as np
import PIL.Image
from fsspec.spec import AbstractFileSystem

CHUNK_SAMPLES = 64
SIDE_PIXELS = 256
COLOURS = ("red", "blue", "green", "yellow")
THINGS = ("a house by the sea", "two cats on a sofa", "an old map of the city", "a plate of fresh bread")
PLACES = ("in the morning", "seen from above", "on a white background", "with people around it")
CAPTIONS = [f"{colour} photo of {thing} {place}" for colour in COLOURS for thing in THINGS for place in PLACES]


def url_of(shard: int) -> str:
    return f"synthetic://corpus/{shard:06d}.tar"


def chunk_bytes(num_samples: int) -> int:
    return _ends()[num_samples - 1]


@lru_cache(maxsize=1)
def chunk() -> bytes:
    """One chunk of 64 samples; its first n samples are a chunk too."""
    return _chunk_and_ends()[0]


def _ends() -> list[int]:
    return _chunk_and_ends()[1]


@lru_cache(maxsize=1)
def _chunk_and_ends() -> tuple[bytes, list[int]]:
    stream, ends = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, caption in enumerate(CAPTIONS):
            meta = {"caption": caption, "url": "x" * 80, "key": f"{number:09d}", "status": "success", "similarity": 0.3}
            members = {"jpg": _picture(number), "json": json.dumps(meta, indent=4).encode(), "txt": caption.encode()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            ends.append(tar.offset)
    return stream.getvalue()[: ends[-1]], ends


def _picture(seed: int) -> bytes:
    """About 20 kB: coarse noise, made large."""
    coarse = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((SIDE_PIXELS, SIDE_PIXELS), PIL.Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


class SyntheticFileSystem(AbstractFileSystem):
    """fsspec's ``synthetic://``: every byte range that is asked for is the beginning of a chunk."""

    protocol = "synthetic"
    shard_bytes = 0

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": self.shard_bytes, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        assert start is not None and end is not None
        return bytes(memoryview(chunk())[: end - start])  # a copy, as from a network
