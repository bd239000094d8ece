"""Writing samples as tar shards whose bytes depend on nothing but the samples."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

JPEG_QUALITY = 92


@dataclass(frozen=True)
class Sample:
    """One WebDataset sample: members by extension, and its texts, from which the tokenizer learns."""

    key: str
    members: dict[str, bytes]
    texts: tuple[str, ...]


def rng_of(*names: object) -> random.Random:
    """An own stream of random numbers for everything that has a name, so that parts can change independently."""
    return random.Random("/".join(map(str, names)))


def encode_image(image: Image.Image, image_format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, quality=JPEG_QUALITY)
    return out.getvalue()


def encode_json(value: Any) -> bytes:
    return json.dumps(value, indent=4).encode()


def write_tar(path: Path, samples: Iterable[Sample]) -> None:
    """Write one shard: members sorted within a sample, no times, no owners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, data in sorted(sample.members.items()):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size, member.mode = len(data), 0o444
                tar.addfile(member, io.BytesIO(data))
