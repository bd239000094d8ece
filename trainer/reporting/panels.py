"""Which charts show a run, and which metrics are in them: the one list for the report's page and wandb's workspace.

Names are those of metrics.jsonl; those of validation.jsonl have "validation/" before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

ALL_SOURCES = "all sources"
MANY = "/*"
"""Ends a name that stands for all metrics of a prefix: one curve per source, module or group."""


@dataclass(frozen=True)
class Panel:
    """A chart over the steps.

    metrics: name -> its name in the chart; a name that ends in /* gives each metric the rest of its own name.
    y_range: the axis reaches so far or ends there; None = as far as the values. limit: a line at a value of the
    configuration, (name, key). whole: the metric that these are parts of; they are stacked, and the rest of it on top.
    zero_if_missing: parts that a step without them does not have; others have only not been measured in each step.
    """

    title: str
    metrics: Mapping[str, str]
    unit: str = ""
    log: bool = False
    y_range: tuple[float | None, float | None] = (None, None)
    limit: tuple[str, str] | None = None
    whole: str = ""
    zero_if_missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """note: how to read these charts, for the report."""

    title: str
    panels: list[Panel] = field(default_factory=list)
    note: str = ""


def one(name: str, label: str = "") -> dict[str, str]:
    return {name: label or name.rpartition("/")[2].replace("_", " ")}


def with_sources(name: str) -> dict[str, str]:
    """The total, then one curve per source."""
    return {f"{name}{MANY}": "", name: ALL_SOURCES}


ZERO = (0.0, None)

SECTIONS = [
    Section(
        "Losses",
        [
            Panel("Text loss", with_sources("loss/text"), "nats per token", log=True),
            Panel("Image loss", with_sources("loss/image"), "squared error", log=True),
            Panel("Perplexity", one("perplexity"), log=True),
        ],
        "A falling image loss alone may be collapse: read it together with the visual embeddings.",
    ),
    Section(
        "Visual embeddings",
        [
            Panel(
                "Explained variance",
                {"explained_variance_first": "first slot", "explained_variance_later": "later slots"},
                y_range=(-0.5, 1.0),
            ),
            Panel(
                "Spread across images",
                one("embedding_spread", "spread"),
                "deviation / root mean square",
                log=True,
                limit=("collapse alarm", "monitor.collapse_spread"),
            ),
            Panel("Effective rank", one("effective_rank"), y_range=ZERO),
            Panel("Size of the embeddings", one("embedding_rms", "root mean square"), y_range=ZERO),
        ],
        "The first slot's explained variance can only come from the context before it. The spread tells whether "
        "different pictures still have different embeddings.",
    ),
    Section(
        "Optimisation",
        [
            Panel(
                "Gradient norm before clipping",
                one("grad_norm", "all parameters"),
                log=True,
                limit=("clipped at", "optim.grad_clip"),
            ),
            Panel("Gradient norm by module", {f"grad_norm{MANY}": ""}, log=True),
            Panel("Learning rates", {f"lr{MANY}": ""}, y_range=ZERO),
        ],
    ),
    Section(
        "Speed",
        [
            Panel("Tokens per second", one("tokens_per_second", "tokens"), y_range=ZERO),
            Panel("Images per second", one("images_per_second", "images"), y_range=ZERO),
            Panel("Model FLOPs per second", one("flops_per_second", "FLOPs"), y_range=ZERO),
            Panel("Model FLOPs utilisation", one("mfu", "MFU"), y_range=ZERO),
            Panel(
                "Where a step's time goes",
                {
                    "seconds/data_wait": "waiting for data",
                    "seconds/forward": "forward",
                    "seconds/backward": "backward",
                    "seconds/optimizer": "optimizer",
                    "seconds/checkpoint": "checkpoint",
                },
                "seconds",
                whole="seconds/step",
                zero_if_missing=("seconds/checkpoint",),
            ),
            Panel("Time of a step", one("seconds/step", "step"), "seconds", log=True),
            Panel("Memory", {"memory/device_gb": "device", "memory/host_gb": "host"}, "GB", y_range=ZERO),
        ],
    ),
    Section(
        "Data",
        [
            Panel("Mixture", {f"mixture{MANY}": ""}, "share of documents so far", y_range=ZERO),
            Panel("Epochs", {f"epoch{MANY}": ""}, y_range=ZERO),
            Panel("Documents so far", {f"samples{MANY}": ""}, y_range=ZERO),
            Panel("Skipped so far", {f"skips{MANY}": ""}, "samples", y_range=ZERO),
            Panel(
                "Fill of the rows",
                {"token_fill": "positions", "image_fill": "image places"},
                "share",
                y_range=(0.0, 1.0),
            ),
            Panel("Tokens in a step", one("tokens"), y_range=ZERO),
            Panel("Images in a step", one("images"), y_range=ZERO),
            Panel("Text targets in a step", {f"targets/text{MANY}": ""}, y_range=ZERO),
            Panel("Image targets in a step", {f"targets/image{MANY}": ""}, y_range=ZERO),
        ],
    ),
    Section(
        "Validation",
        [
            Panel("Validation: text loss", with_sources("validation/loss/text"), "nats per token", log=True),
            Panel("Validation: image loss", with_sources("validation/loss/image"), "squared error", log=True),
            Panel(
                "Validation: text-to-image retrieval",
                one("validation/retrieval_at_1", "right at first"),
                "share",
                y_range=(0.0, 1.0),
            ),
        ],
    ),
]


def matches(pattern: str, name: str) -> bool:
    """Whether a name of `Panel.metrics` stands for this metric."""
    return re.fullmatch(as_regex(pattern), name) is not None


def as_regex(pattern: str) -> str:
    if pattern.endswith(MANY):
        return re.escape(pattern.removesuffix(MANY)) + "/.+"
    return re.escape(pattern)
