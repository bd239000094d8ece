"""Drawing scenes of the drawn world. Coordinates and radii are shares of the picture's side."""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.prepare.drawn_world import DrawnObject, Scene, column_and_row

# hue in degrees, saturation, value
COLOUR_HSV = {
    "red": (0, 0.92, 0.86),
    "orange": (27, 0.98, 1.0),
    "yellow": (54, 0.95, 0.98),
    "green": (128, 0.85, 0.60),
    "cyan": (181, 0.90, 0.92),
    "blue": (224, 0.90, 0.92),
    "purple": (276, 0.75, 0.70),
    "pink": (326, 0.52, 0.94),
}
RADIUS = {"small": 0.106, "large": 0.146}
SHADE_LEVEL = {"light": 234.0, "dark": 198.0}
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Stroke:
    """One object ready to be painted: exact colour, turn in radians, radius and centre."""

    shape: str
    rgb: tuple[int, int, int]
    turn: float
    radius: float
    x: float
    y: float


def _regular(corners: int, radius: float = 1.0, inner: float | None = None) -> list[tuple[float, float]]:
    """Polygon with one corner at the top; with ``inner``, a star of that inner radius."""
    radii = [radius] if inner is None else [radius, inner]
    steps = corners * len(radii)
    angles = (2 * math.pi * k / steps - math.pi / 2 for k in range(steps))
    return [(radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(angles)]


_ARM = 0.34
POLYGONS = {
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(x, y + 0.2) for x, y in _regular(3, 1.15)],
    "star": _regular(5, 1.12, 0.52),
    "cross": [
        *[(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)],
        *[(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
    ],
}
RING_HOLE = 0.56


def place_centre(place: str) -> tuple[float, float]:
    """Centre (x, y) of a place."""
    column, row = column_and_row(place)
    return (2 * column + 1) / 6, (2 * row + 1) / 6


def random_stroke(thing: DrawnObject, rng: random.Random) -> Stroke:
    """How to paint an object: its attributes with a little of everything else varied."""
    hue, saturation, value = COLOUR_HSV[thing.colour]
    red, green, blue = colorsys.hsv_to_rgb(
        ((hue + rng.uniform(-4, 4)) % 360) / 360, saturation * rng.uniform(0.94, 1), value * rng.uniform(0.94, 1)
    )
    x, y = place_centre(thing.place)
    return Stroke(
        shape=thing.shape,
        rgb=(round(255 * red), round(255 * green), round(255 * blue)),
        turn=rng.uniform(-0.1, 0.1),
        radius=RADIUS[thing.size] * rng.uniform(0.94, 1.04),
        x=x + rng.uniform(-0.012, 0.012),
        y=y + rng.uniform(-0.012, 0.012),
    )


def draw_background(shade: str, side: int, rng: random.Random) -> Image.Image:
    """Neutral square of ``side`` pixels whose lightness and tint change slowly across it."""
    level = SHADE_LEVEL[shade] + rng.uniform(-8, 8)
    across = np.linspace(-1, 1, side, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-8, 8), rng.uniform(-8, 8)
    grey = level + slope_x * across[None, :] + slope_y * across[:, None]
    tint = np.array([rng.uniform(-4, 4) for _ in range(3)], dtype=np.float32)
    return Image.fromarray((grey[:, :, None] + tint).astype(np.uint8))


def paint(image: Image.Image, stroke: Stroke) -> None:
    """Paint one object into ``image`` with smooth edges."""
    side = image.width
    reach = 1.3 * stroke.radius * side
    left, top = math.floor(stroke.x * side - reach), math.floor(stroke.y * side - reach)
    box = math.ceil(2 * reach) + 1
    mask = Image.new("L", (box * SUPERSAMPLING, box * SUPERSAMPLING))
    centre = ((stroke.x * side - left) * SUPERSAMPLING, (stroke.y * side - top) * SUPERSAMPLING)
    _fill(ImageDraw.Draw(mask), stroke, centre, stroke.radius * side * SUPERSAMPLING)
    image.paste(stroke.rgb, (left, top), mask.reduce(SUPERSAMPLING))


def _fill(draw: ImageDraw.ImageDraw, stroke: Stroke, centre: tuple[float, float], radius: float) -> None:
    x, y = centre
    if stroke.shape in POLYGONS:
        cos, sin = math.cos(stroke.turn) * radius, math.sin(stroke.turn) * radius
        draw.polygon([(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in POLYGONS[stroke.shape]], fill=255)
        return
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    if stroke.shape == "ring":
        hole = RING_HOLE * radius
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)


def draw_objects(background: Image.Image, objects: Sequence[DrawnObject], rng: random.Random) -> Image.Image:
    """A copy of the background with the objects on it."""
    image = background.copy()
    for thing in objects:
        paint(image, random_stroke(thing, rng))
    return image


def draw_scene(scene: Scene, side: int, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of ``side`` x ``side`` pixels."""
    return draw_objects(draw_background(scene.shade, side, rng), scene.objects, rng)
