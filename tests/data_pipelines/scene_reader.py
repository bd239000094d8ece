"""Reads drawn scenes back from their pixels, by hue and outline: knows nothing of how they were drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

HUES = {"red": 0, "orange": 27, "yellow": 54, "green": 128, "cyan": 181, "blue": 224, "purple": 276, "pink": 326}
GRID = 32
MIN_CHROMA = 45
MIN_AREA = 0.004


class Seen(NamedTuple):
    """An object in a picture; x, y: its middle, and width: as shares of the picture's side."""

    colour: str
    shape: str
    x: float
    y: float
    width: float

    @property
    def places(self) -> set[str]:
        """The nearest place of the 3 x 3 grid, and any other that is hardly farther."""
        centres = {
            " ".join(filter(None, (row, column))) or "centre": ((2 * i + 1) / 6, (2 * j + 1) / 6)
            for j, row in enumerate(("top", "", "bottom"))
            for i, column in enumerate(("left", "", "right"))
        }
        distances = {place: math.dist((self.x, self.y), centre) for place, centre in centres.items()}
        return {place for place, distance in distances.items() if distance < min(distances.values()) + 0.03}

    @property
    def place(self) -> str:
        (place,) = self.places
        return place


def read_scene(image: Image.Image) -> list[Seen]:
    """All objects of a picture, in any order."""
    side = image.width
    return [
        Seen(colour, _outline(part), (cols.start + cols.stop) / 2 / side, (rows.start + rows.stop) / 2 / side, width)
        for colour, part, rows, cols in _parts(image)
        if (width := (cols.stop - cols.start) / side) > 0
    ]


def _parts(image: Image.Image) -> Iterator[tuple[str, np.ndarray, slice, slice]]:
    """(colour, mask, rows, columns) of every connected patch of one colour that is no mere edge."""
    pixels = np.asarray(image.convert("RGB"), dtype=int)
    chroma = pixels.max(2) - pixels.min(2)
    hue = np.asarray(image.convert("HSV"), dtype=float)[:, :, 0] * 360 / 256
    away = np.stack([np.abs((hue - centre + 180) % 360 - 180) for centre in HUES.values()])
    nearest = away.argmin(0)
    for number, colour in enumerate(HUES):
        mask = (nearest == number) & (chroma > MIN_CHROMA)
        if mask.sum() < MIN_AREA * mask.size:
            continue
        # Half of the full colour is where the edge was before the picture was compressed.
        labels, _ = ndimage.label(mask & (chroma > np.percentile(chroma[mask], 90) / 2), structure=np.ones((3, 3)))
        for label, (rows, cols) in enumerate(ndimage.find_objects(labels), start=1):
            part = labels[rows, cols] == label
            if min(part.shape) > image.width / 9 and part.sum() > MIN_AREA * mask.size:
                yield colour, part, rows, cols


def _polygon(points: list[tuple[float, float]], turn: float, hole: float = 0.0) -> np.ndarray:
    """A turned polygon, stretched to fill a GRID x GRID mask."""
    turned = [(x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)) for x, y in points]
    low, high = np.min(turned, 0), np.max(turned, 0)
    scaled = (np.array(turned) - low) / (high - low) * (GRID - 1)
    mask = Image.new("1", (GRID, GRID))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in scaled.tolist()], fill=1)
    if hole:
        margin = (1 - hole) / 2 * GRID
        ImageDraw.Draw(mask).ellipse((margin, margin, GRID - 1 - margin, GRID - 1 - margin), fill=0)
    return np.asarray(mask)


def _points(radii: list[float]) -> list[tuple[float, float]]:
    angles = [2 * math.pi * k / len(radii) for k in range(len(radii))]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True)]


_CROSS = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
_TEMPLATES = {
    "circle": [_polygon(_points([1.0] * 40), 0)],
    "ring": [_polygon(_points([1.0] * 40), 0, hole=0.56)],
    "square": [_polygon([(-1, -1), (1, -1), (1, 1), (-1, 1)], turn) for turn in (-0.1, -0.05, 0, 0.05, 0.1)],
    "triangle": [_polygon(_points([1.0] * 3), turn) for turn in (-0.1, 0, 0.1)],
    "star": [_polygon(_points([1.0, inner] * 5), turn) for turn in (-0.1, 0, 0.1) for inner in (0.42, 0.5, 0.58)],
    "cross": [_polygon(_CROSS, turn) for turn in (-0.1, 0, 0.1)],
}


def _outline(part: np.ndarray) -> str:
    """The shape whose outline, stretched to the same box, has the largest overlap."""
    mask = (
        np.asarray(Image.fromarray(part.astype(np.uint8) * 255).resize((GRID, GRID), Image.Resampling.BILINEAR)) > 127
    )

    def overlap(shape: str) -> float:
        return max((mask & template).sum() / (mask | template).sum() for template in _TEMPLATES[shape])

    return max(_TEMPLATES, key=overlap)
