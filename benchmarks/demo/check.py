"""What an exported model's answers are worth: ``python -m benchmarks.demo.check --out outputs/demo``.

Reads the files that the exported package wrote and the truth of the drawn scenes, knows nothing of the model, and
writes ``predictions/figures.json``. Each figure stands beside the best constant guess and chance.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from conf import run_cli
from data_pipelines.prepare.drawn_world import COLOURS, PLACES, SHAPES, DrawnObject, ObjectDescription, parse_caption

ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "place": PLACES}
NOT_SAID = "not said"
SCENES = ("heldout", "train_probe")


@dataclass(frozen=True)
class Judgement:
    """One caption against its scene. pairs: every true object with what was said of it, None = nothing."""

    pairs: list[tuple[DrawnObject, ObjectDescription | None]]
    num_surplus: int

    def num_right(self, attribute: str) -> int:
        return sum(
            said is not None and getattr(said, attribute) == getattr(true, attribute) for true, said in self.pairs
        )

    @property
    def num_objects(self) -> int:
        """What the caption is judged by: the true objects, and those that it invents."""
        return len(self.pairs) + self.num_surplus

    @property
    def exact(self) -> bool:
        """All objects, all attributes, and nothing that is not there."""
        return self.num_surplus == 0 and all(self.num_right(name) == len(self.pairs) for name in ATTRIBUTES)


@dataclass(frozen=True)
class Score:
    """model: what was measured; constant: the best answer that is the same for every scene; chance: blind choice."""

    model: float
    constant: float
    chance: float


def judge(objects: Sequence[DrawnObject], caption: str) -> Judgement:
    """Match the objects that a caption describes with the true ones, those that agree best first."""
    described = parse_caption(caption)
    agreement = {
        (t, d): sum(getattr(true, name) == getattr(said, name) for name in ATTRIBUTES)
        for t, true in enumerate(objects)
        for d, said in enumerate(described)
    }
    said_of: dict[int, int] = {}
    for t, d in sorted(agreement, key=lambda pair: (-agreement[pair], pair)):
        if t not in said_of and d not in said_of.values():
            said_of[t] = d
    pairs = [(true, described[said_of[t]] if t in said_of else None) for t, true in enumerate(objects)]
    return Judgement(pairs, max(0, len(described) - len(objects)))


def attribute_scores(judgements: Sequence[Judgement]) -> dict[str, Score]:
    """Share of objects described right, by attribute and over all attributes ("all").

    An object that is not described counts as wrong, and so does one that is not there: else naming everything would
    pay. The best constant guess says the most frequent value of each attribute of every object.
    """
    true = [thing for judgement in judgements for thing, _ in judgement.pairs]
    num_objects = sum(judgement.num_objects for judgement in judgements)
    scores = {}
    for name, values in ATTRIBUTES.items():
        most_frequent = Counter(getattr(thing, name) for thing in true).most_common(1)[0][1]
        right = sum(judgement.num_right(name) for judgement in judgements)
        scores[name] = Score(right / num_objects, most_frequent / len(true), 1 / len(values))
    means = np.mean([[score.model, score.constant, score.chance] for score in scores.values()], axis=0)
    return {"all": Score(*means.tolist()), **scores}


def exact_score(judgements: Sequence[Judgement]) -> Score:
    """Share of exact captions. The best constant guess is the most frequent content of a scene."""
    contents = [frozenset(_triple(true) for true, _ in judgement.pairs) for judgement in judgements]
    num_triples = len(COLOURS) * len(SHAPES) * len(PLACES)
    by_chance = [factorial(len(content)) / num_triples ** len(content) for content in contents]
    return Score(
        float(np.mean([judgement.exact for judgement in judgements])),
        Counter(contents).most_common(1)[0][1] / len(contents),
        float(np.mean(by_chance)),
    )


def _triple(thing: DrawnObject) -> tuple[str, ...]:
    return tuple(getattr(thing, name) for name in ATTRIBUTES)


def confusion(judgements: Sequence[Judgement], attribute: str) -> np.ndarray:
    """Counts [true value, said value], in the order of `ATTRIBUTES`; the last column is "not said"."""
    values = ATTRIBUTES[attribute]
    counts = np.zeros((len(values), len(values) + 1), np.int64)
    for true, said in (pair for judgement in judgements for pair in judgement.pairs):
        value = getattr(said, attribute) if said is not None else None
        counts[values.index(getattr(true, attribute)), values.index(value) if value else len(values)] += 1
    return counts


def distances(regressed: np.ndarray, encoded: np.ndarray) -> np.ndarray:
    """Squared distances [texts, images] between visual embeddings [texts, N, W] and [images, N, W].

    The distance that the model is trained to make small, over all slots: nothing is fitted, centred or scaled on the
    images that are searched.
    """
    texts, images = (e.reshape(len(e), -1).astype(np.float64) for e in (regressed, encoded))
    squares = (texts**2).sum(axis=1)[:, None] + (images**2).sum(axis=1)[None, :]
    return squares - 2 * texts @ images.T


def rank_of_own(distance: np.ndarray) -> np.ndarray:
    """Rank, 1 = first, of image i for text i in a square [n, n] of distances; of equally near images it comes last."""
    return (distance <= np.diag(distance)[:, None]).sum(axis=1)


def retrieval_score(distance: np.ndarray, groups: Iterable[Sequence[int]]) -> Score:
    """Share of texts whose own image is the nearest of its group. The same image for every text is right once."""
    ranks = [rank_of_own(distance[np.ix_(group, group)]) for group in groups]
    chance = float(np.mean([1 / len(group) for group in ranks]))
    return Score(float(np.mean(np.concatenate(ranks) == 1)), chance, chance)


@dataclass(frozen=True)
class Answers:
    """The truth of a set of scenes, and what the exported package said. distance: as `distances` gives it."""

    scenes: list[dict[str, Any]]
    groups: list[list[int]]
    captions: list[str]
    distance: np.ndarray


def judge_all(answers: Answers) -> list[Judgement]:
    return [
        judge([DrawnObject(**thing) for thing in scene["objects"]], caption)
        for scene, caption in zip(answers.scenes, answers.captions, strict=True)
    ]


def check(answers: Answers) -> dict[str, Any]:
    """All figures of one set of scenes; JSON."""
    judgements = judge_all(answers)
    by_count = {
        str(number): [judgement for judgement in judgements if len(judgement.pairs) == number]
        for number in sorted({len(judgement.pairs) for judgement in judgements})
    }
    return {
        "num_scenes": len(judgements),
        "attributes": {name: asdict(score) for name, score in attribute_scores(judgements).items()},
        "exact": asdict(exact_score(judgements)),
        "by_num_objects": {
            number: {
                "num_scenes": len(some),
                "attributes": asdict(attribute_scores(some)["all"]),
                "exact": asdict(exact_score(some)),
            }
            for number, some in by_count.items()
        },
        "surplus_objects": sum(judgement.num_surplus for judgement in judgements),
        "missing_objects": sum(said is None for judgement in judgements for _, said in judgement.pairs),
        "confusion": {
            name: {"values": [*values, NOT_SAID], "counts": confusion(judgements, name).tolist()}
            for name, values in ATTRIBUTES.items()
        },
        "retrieval": asdict(retrieval_score(answers.distance, answers.groups)),
        "retrieval_group": len(answers.groups[0]),
        "retrieval_groups": len(answers.groups),
    }


def read_scenes(out: Path, name: str) -> list[dict[str, Any]]:
    lines = (out / "corpora" / name / "scenes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_answers(out: Path) -> dict[str, Answers]:
    """By set of scenes. The package was asked about one set after the other, in the order of `SCENES`."""
    predictions = out / "predictions"
    captions = [json.loads(line)["text"] for line in (predictions / "captions.jsonl").read_text().splitlines()]
    regressed = load_file(predictions / "texts.safetensors")["embeddings"]
    encoded = load_file(predictions / "images.safetensors")["embeddings"]
    answers, start = {}, 0
    for name in SCENES:
        scenes = read_scenes(out, name)
        groups = json.loads((out / "corpora" / name / "retrieval.json").read_text())
        own = slice(start, start + len(scenes))
        answers[name] = Answers(scenes, groups, captions[own], distances(regressed[own], encoded[own]))
        start = own.stop
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of the demo (%(default)s)")
    out = parser.parse_args().out
    figures = {name: check(answers) for name, answers in read_answers(out).items()}
    path = out / "predictions" / "figures.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")
    for name, of_set in figures.items():
        print(f"{name}: {of_set['num_scenes']} scenes, {summary(of_set)}")
    print(f"figures in {path}; next: python -m benchmarks.demo.report --out {out}")


def summary(figures: dict[str, Any]) -> str:
    attributes, exact, retrieval = figures["attributes"]["all"], figures["exact"], figures["retrieval"]
    return (
        f"caption attributes {attributes['model']:.2f}, exact {exact['model']:.2f}, "
        f"text-to-image retrieval@1 of {figures['retrieval_group']} {retrieval['model']:.2f}"
    )


if __name__ == "__main__":
    run_cli(main)
