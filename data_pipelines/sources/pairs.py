"""Generic image-text pairs: one picture member and its caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.document import Document, RawSample
from data_pipelines.sources.common import (
    IMAGE_EXTENSIONS,
    Limits,
    check_at_least,
    check_field,
    check_probability,
    checked_image,
    find_member,
    parse_json,
    read_caption,
    with_caption,
)


@dataclass
class PairsOptions:
    """Options of kind ``pairs``.

    caption: txt | json:<name>; a list under the name gives one of its entries at random.
    image_first_probability: the picture stands before its caption so often, else after it. Emu places it at random;
    the share is not stated, one half is assumed.
    min_image_side: smaller pictures (pixels, by the header) are dropped; not in the paper, off by default.
    """

    caption: str = "txt"
    image_first_probability: float = 0.5
    min_image_side: int = 1

    def __post_init__(self) -> None:
        check_field("caption", self.caption)
        check_probability("image_first_probability", self.image_first_probability)
        check_at_least("min_image_side", self.min_image_side, 1)


def read_pairs(sample: RawSample, rng: np.random.Generator, options: PairsOptions, limits: Limits) -> Document:
    return pair_document(sample, parse_json(sample), rng, options, limits)


def pair_document(
    sample: RawSample, meta: dict[str, Any], rng: np.random.Generator, options: PairsOptions, limits: Limits
) -> Document:
    """One picture and its caption; meta: the parsed json member."""
    encoded = find_member(sample, IMAGE_EXTENSIONS, missing="no image")
    caption = read_caption(sample, meta, options.caption, rng, limits)
    picture = checked_image(encoded, limits, options.min_image_side)
    return with_caption([picture], caption, options.image_first_probability, rng)
