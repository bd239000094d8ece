"""What the readers of all corpora share: members, captions, json, text cleaning, checks of options."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.document import Document, Element, Frame, Image, RawSample, Text
from data_pipelines.headers import check_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SOUND_NOTE = re.compile(r"\[[^\[\]]*\]|[\u2669-\u266c]")


class SampleError(Exception):
    """Ends the reading of a sample; ``reason`` is a short fixed phrase (a key of the counters)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class OptionError(ValueError):
    """A source's option ``key`` has a value that it cannot have; ``rule`` goes on the sentence "... must be"."""

    def __init__(self, key: str, rule: str) -> None:
        super().__init__(f"{key} must be {rule}")
        self.key = key
        self.rule = rule


class Limits(NamedTuple):
    """Bounds on what strangers' samples may cost: pixels of one picture, characters of one document."""

    max_pixels: int
    max_text_characters: int

    @classmethod
    def of(cls, config: DataConfig) -> Limits:
        return cls(int(config.max_image_megapixels * 1e6), config.max_text_characters)


def check_probability(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise OptionError(key, "between 0 and 1")


def check_at_least(key: str, value: float, minimum: float) -> None:
    if not value >= minimum:
        raise OptionError(key, f"at least {minimum}")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(key, " or ".join(choices))


def check_field(key: str, value: str) -> None:
    """A text field is the .txt member or a name in the .json member."""
    if value != "txt" and not re.fullmatch(r"json:.+", value):
        raise OptionError(key, "txt or json:<name>")


def parse_json(sample: RawSample, member: str = "json") -> dict[str, Any]:
    """The object in a json member ({} without the member). Bare NaN, which Python's writers leave, is accepted."""
    try:
        parsed = json.loads(sample.members.get(member, b"{}"))
    except (ValueError, RecursionError) as error:
        raise SampleError("json does not parse") from error
    if not isinstance(parsed, dict):
        raise SampleError("json is not an object")
    return parsed


def read_text(sample: RawSample, meta: dict[str, Any], field: str, rng: np.random.Generator, noun: str) -> str:
    """The sample's text, stripped: ``txt`` = the .txt member, else json.caption (img2dataset's and video2dataset's
    tars hold the same in both); ``json:<name>`` = that field, one of them at random where it is a list.

    noun: what the text is, in the reasons of skips.
    """
    if field == "txt" and "txt" in sample.members:
        text: str | None = _decode_utf8(sample.members["txt"], noun)
    else:
        text = _json_text(meta.get("caption" if field == "txt" else field.removeprefix("json:")), rng)
    if text is None:
        raise SampleError(f"no {noun}")
    if not text.strip():
        raise SampleError(f"empty {noun}")
    return text.strip()


def read_caption(sample: RawSample, meta: dict[str, Any], field: str, rng: np.random.Generator, limits: Limits) -> str:
    """As `read_text`; a caption beyond the limit is no caption, so the sample is dropped and not cut."""
    caption = read_text(sample, meta, field, rng, "caption")
    if len(caption) > limits.max_text_characters:
        raise SampleError("caption too long")
    return caption


def find_member(sample: RawSample, extensions: Sequence[str], missing: str) -> bytes:
    for extension in extensions:
        if extension in sample.members:
            return sample.members[extension]
    raise SampleError(missing)


def checked_image(encoded: bytes, limits: Limits, min_side: int) -> Image:
    """The picture if its header is acceptable."""
    reason = check_image(encoded, limits.max_pixels, min_side)
    if reason:
        raise SampleError(reason)
    return Image(encoded)


def with_caption(
    pictures: Sequence[Image | Frame], caption: str, first_probability: float, rng: np.random.Generator
) -> Document:
    """Pictures and their caption, pictures first with the given probability."""
    text: Sequence[Element] = [Text(caption)]
    pictures_first = rng.random() < first_probability
    return Document(elements=(*pictures, *text) if pictures_first else (*text, *pictures))


def join_texts(items: Iterable[str | Image], max_characters: int) -> tuple[Element, ...]:
    """Elements in the same order, neighbouring texts joined by a space; ends where the text limit is reached."""
    elements: list[Element] = []
    for is_text, run in itertools.groupby((item for item in items if item), key=lambda item: isinstance(item, str)):
        if not is_text:
            elements.extend(item for item in run if isinstance(item, Image))
            continue
        text = " ".join(item for item in run if isinstance(item, str))
        elements.append(Text(text[:max_characters]))
        if len(text) >= max_characters:
            break
        max_characters -= len(text)
    return tuple(elements)


def valid_unicode(text: str) -> str:
    r"""Without the lone surrogates that json escapes such as \ud800 smuggle in and no tokenizer can encode."""
    return text.encode("utf-8", "ignore").decode("utf-8")


def clean_subtitle(text: str) -> str:
    """One line of speech: html entities resolved, notes such as [Music] and note signs gone, white space collapsed."""
    return " ".join(SOUND_NOTE.sub(" ", html.unescape(valid_unicode(text))).split())


def _decode_utf8(encoded: bytes, noun: str) -> str:
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"{noun} is not utf-8") from error


def _json_text(value: Any, rng: np.random.Generator) -> str | None:
    if isinstance(value, list):
        texts = [text for text in value if isinstance(text, str) and text.strip()]
        value = texts[rng.integers(len(texts))] if texts else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise SampleError("malformed sample")
    return valid_unicode(value)
