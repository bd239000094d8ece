"""Small charts for the report, as SVG that a page can hold in an ``<img>``. Sized to be read on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

WIDTH, HEIGHT = 4.6, 2.9  # inches: one chart fills a phone's width, two to three stand side by side on a desktop
SMOOTHED_OVER = 15
INK, FAINT = "#22303c", "#9aa7b1"
TOTAL = "all sources"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "demo",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6eaee",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""


@dataclass(frozen=True)
class Chart:
    """What is drawn over the training steps. limit: a horizontal line (name, value)."""

    curves: Mapping[str, Curve]
    log: bool = False
    limit: tuple[str, float] | None = None
    y_range: tuple[float, float] | None = None
    colours: Mapping[str, str] = field(default_factory=dict)


def curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """The steps whose record has a number under `name`."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def over_steps(chart: Chart, resumed_at: int) -> str:
    """A data URI. Thin lines are the values, thick ones their running mean; the resume is marked."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        for name, (steps, values) in chart.curves.items():
            colour = chart.colours.get(name, INK)
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
            width = 2.2 if name == TOTAL else 1.5
            axes.plot(*smoothed(steps, values), color=colour, linewidth=width, label=name)
        if chart.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if chart.y_range:
            axes.set_ylim(*chart.y_range)
        if chart.limit:
            axes.axhline(chart.limit[1], color="#c0392b", linewidth=1, linestyle=":", label=chart.limit[0])
        axes.axvline(resumed_at, color=INK, linewidth=1, linestyle="--", label="resumed")
        axes.set_xlabel("step")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.2, handlelength=1.4)
        return data_uri(figure)


def smoothed(steps: Sequence[int], values: Sequence[float]) -> Curve:
    """Mean of the last values at each step, fewer at the beginning."""
    totals = np.cumsum(np.concatenate([[0.0], values]))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - SMOOTHED_OVER)
    return steps, ((totals[last] - totals[first]) / (last - first)).tolist()


def confusion_chart(values: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """True values down, said values across (the last of `values` is only said); shares of a row as darkness."""
    table = np.array(counts)
    shares = table / table.sum(axis=1, keepdims=True).clip(min=1)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(WIDTH, WIDTH * 0.92), layout="constrained")
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(table.shape[1]), values, rotation=50, ha="right")
        axes.set_yticks(range(table.shape[0]), values[: table.shape[0]])
        axes.set_xlabel("said")
        axes.set_ylabel("true")
        for row, column in zip(*table.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, table[row, column], ha="center", va="center", color=colour, fontsize=8)
        return data_uri(figure)


def data_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
