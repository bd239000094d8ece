"""Corpora by the tool that wrote them. A source is a pure function (raw sample, rng) -> Document | Skip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from conf import UserError
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Document, RawSample, Skip
from data_pipelines.sources.common import Limits, OptionError, SampleError
from data_pipelines.sources.laion import LaionOptions, read_laion
from data_pipelines.sources.mmc4 import Mmc4Options, read_mmc4
from data_pipelines.sources.pairs import PairsOptions, read_pairs
from data_pipelines.sources.storyboard import StoryboardOptions, read_storyboard
from data_pipelines.sources.text import TextOptions, read_plain_text
from data_pipelines.sources.webvid import WebvidOptions, read_webvid

Source = Callable[[RawSample, np.random.Generator], "Document | Skip"]


class SourceKind(NamedTuple):
    """Options dataclass of a kind, and its reader: (sample, rng, options, limits) -> Document, or `SampleError`."""

    options: type
    read: Callable[[RawSample, np.random.Generator, Any, Limits], Document]


KINDS = {
    "pairs": SourceKind(PairsOptions, read_pairs),
    "laion": SourceKind(LaionOptions, read_laion),
    "mmc4": SourceKind(Mmc4Options, read_mmc4),
    "webvid": SourceKind(WebvidOptions, read_webvid),
    "storyboard": SourceKind(StoryboardOptions, read_storyboard),
    "text": SourceKind(TextOptions, read_plain_text),
}

# What a json member of an unforeseen shape makes a reader raise.
MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


def make_source(name: str, config: SourceConfig, limits: DataConfig) -> Source:
    """The reader of ``data.sources.<name>``: picklable, and it never raises on bad data. Wrong options: `UserError`."""
    if config.kind not in KINDS:
        raise UserError(f"data.sources.{name}.kind is {config.kind!r}: it must be one of {', '.join(KINDS)}")
    kind = KINDS[config.kind]
    options = _parse_options(f"data.sources.{name}.options", kind.options, config)
    return functools.partial(_read_sample, read=kind.read, options=options, limits=Limits.of(limits))


def _read_sample(
    sample: RawSample,
    rng: np.random.Generator,
    read: Callable[[RawSample, np.random.Generator, Any, Limits], Document],
    options: Any,
    limits: Limits,
) -> Document | Skip:
    if sample.defect:
        return Skip(sample.defect)
    try:
        return read(sample, rng, options, limits)
    except SampleError as unusable:
        return Skip(unusable.reason)
    except MALFORMED:
        return Skip("malformed sample")


def _parse_options(where: str, options: type, config: SourceConfig) -> Any:
    schema = OmegaConf.structured(options)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, config.options))
    except OptionError as error:
        raise UserError(f"{where}.{error.key} must be {error.rule}") from error
    except ConfigKeyError as error:
        raise UserError(
            f"{where}.{error.full_key} does not exist: the options of kind {config.kind} are {', '.join(schema)}"
        ) from error
    except OmegaConfBaseException as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{where}.{error.full_key} has a value of the wrong type: {problem}") from error
