"""Pictures of a validation with the captions that the model gave them."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

MOST_SHOWN = 24
LONGEST_SIDE = 192


@dataclass(frozen=True)
class Sample:
    """picture: data URI of a thumbnail, "" if it cannot be read. generated, truth: captions."""

    picture: str
    source: str
    truth: str
    generated: str


def read_samples(folder: Path) -> tuple[str, list[Sample]]:
    """The newest under samples/ that can be read: their folder's name, and the first of them. "", [] without any."""
    for path in sorted(folder.glob("step-*/samples.json"), reverse=True):
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))[:MOST_SHOWN]
            return path.parent.name, [_sample(path.parent, entry) for entry in entries]
        except (OSError, ValueError, TypeError, AttributeError):  # being written
            continue
    return "", []


def _sample(folder: Path, entry: dict[str, str]) -> Sample:
    texts = (str(entry.get(name, "")) for name in ("source", "truth", "generated"))
    return Sample(_thumbnail(folder, str(entry.get("image", ""))), *texts)


def _thumbnail(folder: Path, name: str) -> str:
    if Path(name).name != name:  # a file outside the folder
        return ""
    try:
        with PIL.Image.open(folder / name) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, PIL.Image.DecompressionBombError):
        return ""
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
