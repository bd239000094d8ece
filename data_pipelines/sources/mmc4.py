"""MMC4 pages, in OpenFlamingo's form (<key>.json with image_base64) or lean (<key>.json and <key>.{i}.jpg)."""

from __future__ import annotations

import base64
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.document import Document, Image, RawSample
from data_pipelines.headers import check_image
from data_pipelines.sources.common import (
    IMAGE_EXTENSIONS,
    Limits,
    SampleError,
    check_at_least,
    check_choice,
    check_probability,
    join_texts,
    parse_json,
    valid_unicode,
)


@dataclass
class Mmc4Options:
    """Options of kind ``mmc4``. A page gives one of two sequences; "paper" = Emu's section on pretraining data.

    Pictures: similarity_threshold: CLIP similarity of picture and sentence (paper 0.32, OpenFlamingo's example 0.24,
    0 = off). assignment: stored (matched_text_index, as OpenFlamingo did when Emu was made) | solved (linear assignment
    among the pictures that were downloaded, as OpenFlamingo does since; needs scipy). min_image_kb: smaller files
    are dropped (OpenFlamingo 11; the paper has no such rule). drop_url_duplicates: drop pages whose
    could_have_url_duplicate is set.
    Random subsequence: max_tokens, max_images: paper 1024 tokens with up to the first 5 pictures.
    Matched pictures: matched_probability of the other sequence, matched_max_images random pictures with their sentences
    in matched_max_tokens: paper 5 and 512. The paper makes both from every page, hence one half each.
    single_image_probability: sequences with one picture are kept so often (OpenFlamingo 0.5; not in the paper).
    image_first_probability: a picture stands before its sentence so often, else after it; the paper says at random.
    tokens_per_image, characters_per_token: estimates for choosing where a subsequence starts; packing cuts exactly.
    """

    similarity_threshold: float = 0.32
    assignment: str = "stored"
    min_image_kb: float = 0.0
    drop_url_duplicates: bool = False
    max_tokens: int = 1024
    max_images: int = 5
    matched_probability: float = 0.5
    matched_max_tokens: int = 512
    matched_max_images: int = 5
    single_image_probability: float = 1.0
    image_first_probability: float = 0.5
    tokens_per_image: int = 34
    characters_per_token: float = 4.0

    def __post_init__(self) -> None:
        check_choice("assignment", self.assignment, ("stored", "solved"))
        for key in ("matched_probability", "single_image_probability", "image_first_probability"):
            check_probability(key, getattr(self, key))
        for key in ("max_tokens", "max_images", "matched_max_tokens", "matched_max_images", "tokens_per_image"):
            check_at_least(key, getattr(self, key), 1)
        check_at_least("characters_per_token", self.characters_per_token, 0.1)


class Match(NamedTuple):
    """A usable picture and the number of its sentence. Sorted by sentence wherever there are several."""

    sentence: int
    picture: Image


def read_mmc4(sample: RawSample, rng: np.random.Generator, options: Mmc4Options, limits: Limits) -> Document:
    if "json" not in sample.members:
        raise SampleError("no json")
    page = parse_json(sample)
    if options.drop_url_duplicates and page.get("could_have_url_duplicate"):
        raise SampleError("filtered: url duplicate")
    sentences = [valid_unicode(sentence).strip() for sentence in page["text_list"]]
    if not any(sentences):
        raise SampleError("no text")
    matches = _match_pictures(sample, page, len(sentences), options, limits)
    if rng.random() < options.matched_probability:
        matches = _sample_matches(matches, options.matched_max_images, rng)
        order: Sequence[int] = sorted({match.sentence for match in matches})
        max_tokens = options.matched_max_tokens
    else:
        order = _choose_subsequence(sentences, matches, options, rng)
        matches = [match for match in matches if match.sentence in order][: options.max_images]
        max_tokens = options.max_tokens
    if len(matches) == 1 and rng.random() >= options.single_image_probability:
        raise SampleError("filtered: single image")
    items = _interleave(sentences, order, matches, options.image_first_probability, rng)
    return Document(join_texts(items, limits.max_text_characters), max_tokens)


def _match_pictures(
    sample: RawSample, page: dict[str, Any], num_sentences: int, options: Mmc4Options, limits: Limits
) -> list[Match]:
    """Usable pictures in the order of their sentences (image_info is in another order)."""
    infos = page["image_info"]
    present = [number for number, info in enumerate(infos) if _stored_picture(sample, number, info)]
    if not present:
        raise SampleError("no image")
    pairs = (_stored_pairs if options.assignment == "stored" else _solved_pairs)(page, present, num_sentences)
    chosen = sorted((sentence, number) for sentence, number, score in pairs if score >= options.similarity_threshold)
    if not chosen:
        raise SampleError("no picture above the similarity threshold")
    matches, reason = [], "not an image"
    for sentence, number in chosen:
        encoded = _read_picture(_stored_picture(sample, number, infos[number]))
        problem = _check_picture(encoded, options, limits)
        if problem:
            reason = problem
        else:
            matches.append(Match(sentence, Image(encoded)))
    if not matches:
        raise SampleError(reason)
    return matches


def _stored_picture(sample: RawSample, number: int, info: dict[str, Any]) -> str | bytes | None:
    """base64 text in image_info, else the member {number}.jpg, else None: the download had failed."""
    members = (sample.members.get(f"{number}.{extension}") for extension in IMAGE_EXTENSIONS)
    return info.get("image_base64") or next((member for member in members if member), None)


def _read_picture(stored: str | bytes | None) -> bytes:
    if isinstance(stored, bytes):
        return stored
    try:
        return base64.b64decode(stored or "")
    except ValueError:
        return b""


def _check_picture(encoded: bytes, options: Mmc4Options, limits: Limits) -> str | None:
    if len(encoded) < options.min_image_kb * 1000:
        return "image file too small"
    return check_image(encoded, limits.max_pixels)


def _stored_pairs(page: dict[str, Any], present: list[int], num_sentences: int) -> list[tuple[int, int, float]]:
    """(sentence, picture, similarity) as mmc4 matched them."""
    infos = [(number, page["image_info"][number]) for number in present]
    pairs = [(info["matched_text_index"], number, info["matched_sim"]) for number, info in infos]
    return [pair for pair in pairs if 0 <= pair[0] < num_sentences]


def _solved_pairs(page: dict[str, Any], present: list[int], num_sentences: int) -> list[tuple[int, int, float]]:
    """(sentence, picture, similarity) of the best one-to-one assignment among the pictures that are there."""
    from scipy.optimize import linear_sum_assignment  # an optional choice: not worth its import time otherwise

    rows = [page["similarity_matrix"][number] for number in present]
    similarity = np.nan_to_num(np.array(rows, dtype=np.float64), nan=-1.0).reshape(len(present), num_sentences)
    pictures, sentences = linear_sum_assignment(similarity, maximize=True)
    return [
        (int(sentence), present[picture], float(similarity[picture, sentence]))
        for picture, sentence in zip(pictures, sentences, strict=True)
    ]


def _sample_matches(matches: list[Match], max_images: int, rng: np.random.Generator) -> list[Match]:
    chosen = rng.choice(len(matches), size=min(max_images, len(matches)), replace=False)
    return [matches[number] for number in sorted(chosen)]


def _choose_subsequence(
    sentences: list[str], matches: list[Match], options: Mmc4Options, rng: np.random.Generator
) -> range:
    """Sentences of a random subsequence that holds at least one picture within max_tokens, by estimate.

    It goes on to twice the estimate, so that packing cuts it and not this guess.
    """
    tokens = [len(sentence) / options.characters_per_token for sentence in sentences]
    for match in matches:
        tokens[match.sentence] += options.tokens_per_image
    ends = np.concatenate([[0.0], np.cumsum(tokens)])
    places = [match.sentence for match in matches]
    last_start = max(int(np.searchsorted(ends, ends[-1] - options.max_tokens, side="right")) - 1, 0)
    starts = [start for start in range(last_start + 1) if _holds_picture(start, places, ends, options.max_tokens)]
    start = int(rng.choice(starts or places))
    stop = int(np.searchsorted(ends, ends[start] + 2 * options.max_tokens))
    return range(start, min(max(stop, start + 1), len(sentences)))


def _holds_picture(start: int, places: list[int], ends: np.ndarray, max_tokens: int) -> bool:
    """Whether the first picture from sentence ``start`` on, and its sentence, lie within max_tokens."""
    first = bisect_left(places, start)
    return first < len(places) and ends[places[first] + 1] - ends[start] <= max_tokens


def _interleave(
    sentences: list[str], order: Sequence[int], matches: list[Match], first_probability: float, rng: np.random.Generator
) -> list[str | Image]:
    """Sentences in order, each with its pictures right before or right after it."""
    items: list[str | Image] = []
    for number in order:
        before: list[Image] = []
        after: list[Image] = []
        for picture in (match.picture for match in matches if match.sentence == number):
            (before if rng.random() < first_probability else after).append(picture)
        items += [*before, sentences[number], *after]
    return items
