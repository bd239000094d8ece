"""LAION-2B and LAION-COCO as img2dataset writes them: <key>.jpg, <key>.json, <key>.txt."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.document import Document, RawSample
from data_pipelines.sources.common import Limits, SampleError, check_choice, parse_json
from data_pipelines.sources.pairs import PairsOptions, pair_document


@dataclass
class LaionOptions(PairsOptions):
    """Options of kind ``laion``: those of ``pairs``, and filters on json fields, off by default: the paper has none.

    caption: LAION-COCO keeps the alt text in txt and the good caption in json:top_caption (json:all_captions = one of
    all candidates at random).
    min_similarity: CLIP similarity of picture and alt text. max_punsafe, max_pwatermark: LAION's two classifiers.
    drop_nsfw: values of the field NSFW to drop, such as NSFW and UNSURE (case does not matter).
    missing_fields: drop | keep a sample when a field that a filter needs is absent, null or NaN. Default drop:
    a filter that lets through whatever is not labelled is no filter.
    """

    min_similarity: float | None = None
    max_punsafe: float | None = None
    max_pwatermark: float | None = None
    drop_nsfw: list[str] = field(default_factory=list)
    missing_fields: str = "drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("missing_fields", self.missing_fields, ("drop", "keep"))


def read_laion(sample: RawSample, rng: np.random.Generator, options: LaionOptions, limits: Limits) -> Document:
    meta = parse_json(sample)
    _filter(meta, options)
    return pair_document(sample, meta, rng, options, limits)


def _filter(meta: dict[str, Any], options: LaionOptions) -> None:
    drop_missing = options.missing_fields == "drop"
    _filter_number(meta, "similarity", options.min_similarity, drop_missing, is_least=True)
    _filter_number(meta, "punsafe", options.max_punsafe, drop_missing)
    _filter_number(meta, "pwatermark", options.max_pwatermark, drop_missing)
    _filter_nsfw(meta.get("NSFW"), options.drop_nsfw, drop_missing)


def _filter_number(
    meta: dict[str, Any], name: str, bound: float | None, drop_missing: bool, is_least: bool = False
) -> None:
    if bound is None:
        return
    value = _number(meta.get(name))
    if value is None:
        if drop_missing:
            raise SampleError(f"filtered: no {name}")
    elif value < bound if is_least else value > bound:
        raise SampleError(f"filtered: {name}")


def _filter_nsfw(label: Any, dropped: list[str], drop_missing: bool) -> None:
    if not dropped:
        return
    if not isinstance(label, str):
        if drop_missing:
            raise SampleError("filtered: no NSFW")
    elif label.upper() in {value.upper() for value in dropped}:
        raise SampleError("filtered: NSFW")


def _number(value: Any) -> float | None:
    """None for what is absent, null, NaN or no number (img2dataset writes parquet's NaN as a bare NaN)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)
