"""Held-out scenes for the report: captions with each word marked right or wrong, and what a text retrieves."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.demo.check import ATTRIBUTES, Answers, Judgement, judge_all, rank_of_own
from data_pipelines.prepare.drawn_world import DrawnObject, ObjectDescription, parse_caption

NUM_CAPTIONS = 6
NUM_FAILURES = 6
NUM_QUERIES = 4
NUM_NEAREST = 5
RIGHT, WRONG, PLAIN = "right", "wrong", "plain"

_WORDS = {
    name: re.compile(r"\b(?:" + "|".join(sorted(values, key=len, reverse=True)) + r")\b")
    for name, values in ATTRIBUTES.items()
}


@dataclass(frozen=True)
class CaptionExample:
    """words: pieces of the generated caption, each with right, wrong or plain. num_missing: objects not mentioned."""

    picture: str
    true: str
    words: list[tuple[str, str]]
    exact: bool
    num_missing: int


@dataclass(frozen=True)
class RetrievalExample:
    """nearest: (picture, whether it is the query's own), nearest first. rank: of the query's own picture."""

    query: str
    own: str
    nearest: list[tuple[str, bool]]
    rank: int
    group_size: int


def caption_examples(answers: Answers, folder: Path) -> dict[str, list[CaptionExample]]:
    """The first scenes with one object, the first with two, and the first captions that are not exact."""
    judged = judge_all(answers)
    numbers = range(len(judged))
    one, two = ([n for n in numbers if len(judged[n].pairs) == count][:NUM_CAPTIONS] for count in (1, 2))
    failed = [n for n in numbers if not judged[n].exact and n not in one + two][:NUM_FAILURES]

    def example(number: int) -> CaptionExample:
        scene, judgement = answers.scenes[number], judged[number]
        words = list(mark_words(answers.captions[number], judgement))
        num_missing = sum(said is None for _, said in judgement.pairs)
        return CaptionExample(
            picture_uri(folder / scene["file"]), scene["caption"], words, judgement.exact, num_missing
        )

    return {name: [example(n) for n in some] for name, some in (("one", one), ("two", two), ("failed", failed))}


def mark_words(caption: str, judgement: Judgement) -> Iterator[tuple[str, str]]:
    """Cut a caption into pieces; those that name an attribute are right or wrong of the object they describe."""
    marks: dict[tuple[int, int], str] = {}
    position = dict.fromkeys(ATTRIBUTES, 0)
    for true, said in in_order_of_caption(caption, judgement):
        for name, finder in _WORDS.items():
            value = getattr(said, name)
            found = (m for m in finder.finditer(caption.lower(), position[name]) if m.group() == value)
            if match := next(found, None):
                marks[match.span()] = RIGHT if value == getattr(true, name, None) else WRONG
                position[name] = match.end()
    yield from cut(caption, marks)


def in_order_of_caption(caption: str, judgement: Judgement) -> Iterator[tuple[DrawnObject | None, ObjectDescription]]:
    """What a caption describes, each with the true object that it was matched with; None = surplus."""
    left = list(judgement.pairs)
    for said in parse_caption(caption):
        pair = next((pair for pair in left if pair[1] == said), None)
        if pair is not None:
            left.remove(pair)
        yield pair[0] if pair else None, said


def cut(text: str, marks: dict[tuple[int, int], str]) -> Iterator[tuple[str, str]]:
    """The marked spans of a text and the plain pieces between them."""
    position = 0
    for begin, end in sorted(marks):
        yield text[position:begin], PLAIN
        yield text[begin:end], marks[begin, end]
        position = end
    yield text[position:], PLAIN


def retrieval_examples(answers: Answers, folder: Path) -> dict[str, list[RetrievalExample]]:
    """The first queries, and the first ones whose own image is not the nearest."""
    ranked = [
        (group, place, rank)
        for group in answers.groups
        for place, rank in enumerate(rank_of_own(answers.distance[np.ix_(group, group)]))
    ]
    first, rest = ranked[:NUM_QUERIES], ranked[NUM_QUERIES:]
    failed = [(group, place, rank) for group, place, rank in rest if rank > 1][:NUM_QUERIES]

    def example(group: list[int], place: int, rank: int) -> RetrievalExample:
        own = group[place]
        order = np.argsort(answers.distance[own, group], kind="stable")[:NUM_NEAREST]
        files = [(answers.scenes[group[n]]["file"], n == place) for n in order.tolist()]
        nearest = [(picture_uri(folder / file), is_own) for file, is_own in files]
        scene = answers.scenes[own]
        return RetrievalExample(scene["caption"], picture_uri(folder / scene["file"]), nearest, int(rank), len(group))

    return {"first": [example(*query) for query in first], "failed": [example(*query) for query in failed]}


def picture_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
