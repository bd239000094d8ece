"""The drawn world: which combinations are held out, captions and their reading, pictures."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest

from data_pipelines.prepare.drawing import draw_scene
from data_pipelines.prepare.drawn_world import (
    COLOURS,
    OBJECT_TEMPLATES,
    PLACES,
    SHADES,
    SHAPES,
    SIZES,
    DrawnObject,
    ObjectDescription,
    Scene,
    all_triples,
    caption_scene,
    describe_object,
    is_held_out,
    parse_caption,
    random_scene,
    relation,
)
from tests.data_pipelines.scene_reader import read_scene

COLUMN = {place: ("right" in place) - ("left" in place) for place in PLACES}
ROW = {place: ("bottom" in place) - ("top" in place) for place in PLACES}


def triples(scene: Scene) -> list[tuple[str, str, str]]:
    return [(thing.colour, thing.shape, thing.place) for thing in scene.objects]


def random_scenes(count: int) -> list[Scene]:
    rng = random.Random(7)
    return [random_scene(rng, number % 3 + 1) for number in range(count)]


def test_held_out_triples_are_a_ninth_and_every_pair_of_attributes_is_trained() -> None:
    held_out, trained = list(all_triples(held_out=True)), list(all_triples(held_out=False))
    assert len(held_out) == 8 * 6 * 9 / 9 == len({(colour, shape) for colour, shape, _ in held_out})
    assert len(held_out) + len(trained) == 8 * 6 * 9
    assert {(colour, shape) for colour, shape, _ in trained} == set(product(COLOURS, SHAPES))
    assert {(colour, place) for colour, _, place in trained} == set(product(COLOURS, PLACES))
    assert {(shape, place) for _, shape, place in trained} == set(product(SHAPES, PLACES))


def test_the_held_out_triples_do_not_change_with_the_code() -> None:
    assert is_held_out("red", "circle", "top left")
    assert is_held_out("blue", "star", "bottom")
    assert not is_held_out("blue", "star", "bottom right")


def test_random_scenes_keep_to_the_trained_side_and_to_one_object_a_place() -> None:
    for scene in random_scenes(600):
        assert not any(is_held_out(*triple) for triple in triples(scene))
        assert len({thing.place for thing in scene.objects}) == len(scene.objects)
        assert len({(thing.colour, thing.shape) for thing in scene.objects}) == len(scene.objects)


@pytest.mark.parametrize("template", OBJECT_TEMPLATES)
@pytest.mark.parametrize("with_size", [True, False])
def test_every_template_is_read_back_for_every_object(template: str, with_size: bool) -> None:
    says_size = with_size or "{size}" in template
    for colour, shape, size, place in product(COLOURS, SHAPES, SIZES, PLACES):
        caption = describe_object(DrawnObject(colour, shape, size, place), template, with_size)
        assert len(caption.split()) <= 10
        assert parse_caption(caption) == [ObjectDescription(colour, shape, place, size if says_size else None)], caption


def test_captions_of_scenes_are_read_back_in_order_and_sizes_are_true() -> None:
    rng = random.Random(3)
    with_sizes = 0
    for scene in random_scenes(1500):
        read = parse_caption(caption_scene(scene, rng))
        assert [(found.colour, found.shape, found.place) for found in read] == triples(scene)
        sizes = [found.size for found in read]
        assert sizes in ([thing.size for thing in scene.objects], [None] * len(scene.objects))
        with_sizes += sizes[0] is not None
    assert 0.6 < with_sizes / 1500 < 0.8


def test_the_vocabulary_is_tiny() -> None:
    rng = random.Random(5)
    words = Counter(
        word.strip(",;:.") for scene in random_scenes(1500) for word in caption_scene(scene, rng).lower().split()
    )
    assert len(words) <= 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("the the at left of", []),
        ("A large RED circle\n at the top   left.", [("red", "circle", "top left", "large")]),
        ("a red circle at the", [("red", "circle", None, None)]),
        ("a red at the left", [("red", None, "left", None)]),
        ("a circle at the top", [(None, "circle", "top", None)]),
        (
            "a red circle at the left a blue star at the bottom right",
            [("red", "circle", "left", None), ("blue", "star", "bottom right", None)],
        ),
        ("a red ring at the top; the ring is above the star", [("red", "ring", "top", None)]),
        ("a redcircle at the top starring", []),
    ],
)
def test_reading_broken_captions(text: str, expected: list[tuple[str | None, ...]]) -> None:
    assert [(found.colour, found.shape, found.place, found.size) for found in parse_caption(text)] == expected


def test_relations_are_true_and_told_only_along_one_direction() -> None:
    for first_place, second_place in product(PLACES, PLACES):
        if first_place == second_place:
            continue
        first = DrawnObject("red", "circle", "small", first_place)
        second = DrawnObject("blue", "star", "small", second_place)
        same_row, same_column = ROW[first_place] == ROW[second_place], COLUMN[first_place] == COLUMN[second_place]
        text = relation(first, second)
        assert (text is not None) == (same_row or same_column)
        if text and same_row:
            assert ("left of" in text) == (COLUMN[first_place] < COLUMN[second_place])
        elif text:
            assert ("above" in text) == (ROW[first_place] < ROW[second_place])


def test_equal_shapes_are_told_apart_by_their_colours() -> None:
    text = relation(DrawnObject("red", "ring", "small", "left"), DrawnObject("blue", "ring", "small", "right"))
    assert text == "the red ring is left of the blue ring"


@pytest.mark.slow
@pytest.mark.parametrize("side", [128, 96])
def test_pictures_show_every_attribute(side: int) -> None:
    rng = random.Random(11)
    widths: dict[tuple[str, str], list[float]] = {}
    for number, (colour, shape, place) in enumerate(product(COLOURS, SHAPES, PLACES)):
        size = SIZES[number % 2]
        scene = Scene(SHADES[number // 2 % 2], (DrawnObject(colour, shape, size, place),))
        (seen,) = read_scene(draw_scene(scene, side, rng))
        assert (seen.colour, seen.shape, seen.place) == (colour, shape, place)
        widths.setdefault((shape, size), []).append(seen.width)
    for shape in SHAPES:
        assert max(widths[shape, "small"]) * 1.15 < min(widths[shape, "large"])


def test_two_drawings_of_a_scene_differ_but_the_same_seed_repeats() -> None:
    scene = random_scenes(1)[0]
    first, second, again = (draw_scene(scene, 64, random.Random(seed)).tobytes() for seed in (1, 2, 1))
    assert first == again != second
