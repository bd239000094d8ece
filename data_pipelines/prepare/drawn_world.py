"""The drawn world: scenes of coloured shapes at places, their captions, and reading such captions back.

A fixed ninth of the (colour, shape, place) triples is held out: every pair of attributes occurs in training, those
triples never do, so describing them right takes more than remembering.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SHADES = ("light", "dark")

SIZE_MENTIONED = 0.7

# {np} = "a small red circle", {bare} = "red circle"; the parser relies on one object between two separators.
OBJECT_TEMPLATES = (
    "{np} at the {place}",
    "at the {place} there is {np}",
    "there is {np} at the {place}",
    "{place}: {np}",
    "the {bare} at the {place} is {size}",
)
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class DrawnObject:
    """One shape of a scene; the attributes are words of the tuples above."""

    colour: str
    shape: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One to three objects in reading order, no two at one place, on a light or dark background."""

    shade: str
    objects: tuple[DrawnObject, ...]


@dataclass(frozen=True)
class ObjectDescription:
    """What a caption says of one object; None = not said."""

    colour: str | None
    shape: str | None
    place: str | None
    size: str | None = None


def column_and_row(place: str) -> tuple[int, int]:
    """Column and row, each 0..2, of a place in the 3 x 3 grid."""
    row, column = divmod(PLACES.index(place), 3)
    return column, row


def is_held_out(colour: str, shape: str, place: str) -> bool:
    """Whether a triple is kept out of every training corpus.

    A Latin-square rule: each (colour, shape) lacks one place, each (colour, place) and (shape, place) at most one
    shape or colour.
    """
    return (COLOURS.index(colour) + 2 * SHAPES.index(shape) + PLACES.index(place)) % 9 == 0


def all_triples(held_out: bool) -> Iterator[tuple[str, str, str]]:
    """All (colour, shape, place) triples on one side of the rule."""
    return (triple for triple in product(COLOURS, SHAPES, PLACES) if is_held_out(*triple) is held_out)


_TRAINED = tuple(all_triples(held_out=False))


def random_trained_object(rng: random.Random) -> DrawnObject:
    colour, shape, place = rng.choice(_TRAINED)
    return DrawnObject(colour, shape, rng.choice(SIZES), place)


def random_scene(rng: random.Random, num_objects: int, first: DrawnObject | None = None) -> Scene:
    """A scene of trained triples (``first``, if given, is taken as it is) in reading order; no two look the same."""
    objects = [first or random_trained_object(rng)]
    while len(objects) < num_objects:
        new = random_trained_object(rng)
        if all(new.place != old.place and (new.colour, new.shape) != (old.colour, old.shape) for old in objects):
            objects.append(new)
    objects.sort(key=lambda thing: PLACES.index(thing.place))
    return Scene(rng.choice(SHADES), tuple(objects))


def noun_phrase(thing: DrawnObject, with_size: bool) -> str:
    """For example "an orange star", "a small orange star"."""
    words = [thing.size] * with_size + [thing.colour, thing.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def describe_object(thing: DrawnObject, template: str, with_size: bool) -> str:
    return template.format(
        np=noun_phrase(thing, with_size), bare=f"{thing.colour} {thing.shape}", place=thing.place, size=thing.size
    )


def relation(first: DrawnObject, second: DrawnObject) -> str | None:
    """For example "the circle is left of the star"; None when the places differ in both directions."""
    (column, row), (other_column, other_row) = column_and_row(first.place), column_and_row(second.place)
    if column != other_column and row != other_row:
        return None
    if row == other_row:
        words = "left of" if column < other_column else "right of"
    else:
        words = "above" if row < other_row else "below"
    same_shape = first.shape == second.shape
    names = [f"{thing.colour} {thing.shape}" if same_shape else thing.shape for thing in (first, second)]
    return f"the {names[0]} is {words} the {names[1]}"


def caption_scene(scene: Scene, rng: random.Random) -> str:
    """A caption that names colour, shape and place of every object, and mostly the sizes."""
    with_size = rng.random() < SIZE_MENTIONED
    if len(scene.objects) == 1:
        template = rng.choice(OBJECT_TEMPLATES if with_size else OBJECT_TEMPLATES[:-1])
        return describe_object(scene.objects[0], template, with_size)
    template = rng.choice(OBJECT_TEMPLATES[:2])
    phrases = [describe_object(thing, template, with_size) for thing in scene.objects]
    caption = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    clause = relation(*scene.objects) if len(phrases) == 2 else None
    return f"{caption}; {clause}" if clause and rng.random() < 0.5 else caption


def _one_of(words: Sequence[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_NAME = rf"(?:the )?(?:{_one_of(COLOURS)} )?{_one_of(SHAPES)}"
_RELATION = re.compile(rf"{_NAME} is {_one_of(RELATIONS)} {_NAME}")
_SEPARATOR = re.compile(r"[,;.]|\band\b")
_FINDERS = {
    name: re.compile(rf"\b{_one_of(words)}\b")
    for name, words in {"colour": COLOURS, "shape": SHAPES, "place": PLACES, "size": SIZES}.items()
}


def parse_caption(text: str) -> list[ObjectDescription]:
    """The objects that a caption describes, in its order.

    Made for generated text: anything not understood is passed over, an attribute not said is None, and a piece of
    text without a shape or a colour is no object.
    """
    pieces = _SEPARATOR.split(_RELATION.sub(" ", " ".join(text.lower().split())))
    return [described for piece in pieces for described in _parse_piece(piece)]


def _parse_piece(piece: str) -> Iterator[ObjectDescription]:
    """Objects between two separators: one, or (in broken text) the k-th colour with the k-th shape and so on."""
    found = {name: finder.findall(piece) for name, finder in _FINDERS.items()}
    for k in range(max(len(found["colour"]), len(found["shape"]))):
        yield ObjectDescription(**{name: words[k] if k < len(words) else None for name, words in found.items()})
