"""Text without pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.document import Document, RawSample, Text
from data_pipelines.sources.common import Limits, check_field, parse_json, read_text


@dataclass
class TextOptions:
    """Options of kind ``text``. text: txt | json:<name>. (Emu itself trains on no text-only corpus.)"""

    text: str = "txt"

    def __post_init__(self) -> None:
        check_field("text", self.text)


def read_plain_text(sample: RawSample, rng: np.random.Generator, options: TextOptions, limits: Limits) -> Document:
    """The whole text, or its first data.max_text_characters."""
    text = read_text(sample, parse_json(sample), options.text, rng, "text")
    return Document(elements=(Text(text[: limits.max_text_characters]),))
