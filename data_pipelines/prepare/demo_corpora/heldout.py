"""Scenes for judging a trained model: unseen combinations (``heldout``), and new drawings of seen ones
(``train_probe``), so that the gap between the two shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

from data_pipelines.prepare.demo_corpora.laion import SIDE
from data_pipelines.prepare.demo_corpora.shards import encode_image, rng_of
from data_pipelines.prepare.drawing import draw_scene
from data_pipelines.prepare.drawn_world import SIZES, DrawnObject, Scene, all_triples, caption_scene, random_scene

RETRIEVAL_GROUP = 32


def write_scenes(folder: Path, name: str, count: int, seed: int) -> None:
    """Write ``count`` scenes (two of three with one object) as images/*.png, scenes.jsonl and retrieval.json.

    name: "heldout" gives every scene one object of a held-out triple, anything else none.
    retrieval.json: groups of 32 line numbers whose scenes differ in more than size.
    """
    (folder / "images").mkdir(parents=True)
    scenes = list(_scenes(name, count, seed))
    lines = []
    for number, scene in enumerate(scenes):
        rng = rng_of(name, "drawing", seed, number)
        file = f"images/{number:04d}.png"
        (folder / file).write_bytes(encode_image(draw_scene(scene, SIDE, rng), "PNG"))
        objects = [asdict(thing) for thing in scene.objects]
        lines.append(json.dumps({"file": file, "caption": caption_scene(scene, rng), "objects": objects}) + "\n")
    (folder / "scenes.jsonl").write_text("".join(lines))
    (folder / "retrieval.json").write_text(json.dumps(_retrieval_groups(scenes)) + "\n")


def _scenes(name: str, count: int, seed: int) -> Iterator[Scene]:
    """Every third scene has two objects. Triples come in turn, so that neighbours differ and all occur."""
    rng = rng_of(name, "scenes", seed)
    triples = list(all_triples(held_out=name == "heldout"))
    turns = {num_objects: cycle(rng.sample(triples, len(triples))) for num_objects in (1, 2)}
    for number in range(count):
        num_objects = 2 if number % 3 == 2 else 1
        colour, shape, place = next(turns[num_objects])
        yield random_scene(rng, num_objects, DrawnObject(colour, shape, rng.choice(SIZES), place))


def _retrieval_groups(scenes: list[Scene]) -> list[list[int]]:
    """As many groups as fit, each filled with the first scenes left over that differ from those it has."""
    left = list(range(len(scenes)))
    groups: list[list[int]] = []
    while True:
        group: dict[frozenset[tuple[str, str, str]], int] = {}
        for number in left:
            content = frozenset((thing.colour, thing.shape, thing.place) for thing in scenes[number].objects)
            if len(group) < RETRIEVAL_GROUP:
                group.setdefault(content, number)
        if len(group) < RETRIEVAL_GROUP:
            return groups
        groups.append(sorted(group.values()))
        left = [number for number in left if number not in group.values()]
