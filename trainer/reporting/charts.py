"""Line charts over the training steps as numbers for charts.html.j2, which draws them as SVG inside the page.

A curve of many steps is thinned to bins: its line is the mean of each (a running mean over some of them where there are
many), the pale band around it reaches from the smallest to the largest value, so that a spike of one step is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

TEMPLATES = Path(__file__).parent
WIDTH, HEIGHT = 400, 230  # units of the SVG: about a pixel where three charts stand side by side
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 8, 22
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
MAX_BINS = 320
"""Mean, smallest and largest of each: about a thousand points a curve."""
SMOOTHED_SHARE = 1 / 40
"""Of a curve's bins, the running mean is over so many."""
MAX_DOTS = 40
SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Curve:
    """steps [N] ascending, values [N]. colour: as CSS has it. is_total: drawn stronger than the others."""

    name: str
    steps: Sequence[int] | np.ndarray
    values: Sequence[float] | np.ndarray
    colour: str
    is_total: bool = False


@dataclass(frozen=True)
class Level:
    """A dotted horizontal line. name: in the legend; "" = not there."""

    value: float
    colour: str
    name: str = ""


@dataclass(frozen=True)
class Mark:
    """A vertical line. kind: its class in the style sheet. title: what the pointer shows."""

    step: int
    kind: str
    title: str


@dataclass(frozen=True)
class Chart:
    """y_range: where the axis has to reach and to end; None = by the values. stacked: curves with the same steps."""

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    log: bool = False
    y_range: tuple[float | None, float | None] = (None, None)
    levels: Sequence[Level] = ()
    marks: Sequence[Mark] = ()
    stacked: bool = False


@dataclass(frozen=True)
class Bins:
    """All [N]; steps: the last of each."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Scale:
    """Values to places of 0..size."""

    first: float
    last: float
    size: float
    log: bool = False

    def places(self, values: np.ndarray) -> np.ndarray:
        first, last = self.first, self.last
        if self.log:
            first, last, values = math.log10(first), math.log10(last), np.log10(values)
        return np.asarray(((values - first) / (last - first)).clip(-1, 2) * self.size)


@dataclass(frozen=True)
class Line:
    """points, band: as an SVG polygon has them; band "" = none. last: the newest value, in words."""

    curve: Curve
    points: str
    band: str
    dots: list[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class Drawing:
    """What charts.html.j2 draws; places in units of the plot, the y axis down."""

    width: ClassVar[int] = WIDTH
    height: ClassVar[int] = HEIGHT
    left: ClassVar[int] = LEFT
    top: ClassVar[int] = TOP
    chart: Chart
    x: Scale
    y: Scale
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    levels: list[tuple[float, Level]]
    marks: list[tuple[float, Mark]]


def draw(chart: Chart) -> Drawing:
    """A curve without points, or without positive ones where log is asked for, is left out."""
    curves = [curve for curve in map(_clean, chart.curves, [chart.log] * len(chart.curves)) if len(curve.steps)]
    bins = [thin(np.asarray(curve.steps), np.asarray(curve.values)) for curve in curves]
    if chart.stacked:
        bins = _stack(bins)
    x = _x_scale(bins)
    y = _y_scale(chart, bins)
    floors = [bins[number - 1].mean if number else 0 * each.mean for number, each in enumerate(bins)]
    lines = [
        _area(curve, each, floors[number], x, y) if chart.stacked else _line(curve, each, x, y)
        for number, (curve, each) in enumerate(zip(curves, bins, strict=True))
    ]
    return Drawing(
        chart,
        x,
        y,
        _ticks(x, [tick for tick in nice_ticks(x.first, x.last, 5) if tick == int(tick)]),
        [(PLOT_HEIGHT - place, text) for place, text in _ticks(y, _y_ticks(y))],
        lines,
        [(PLOT_HEIGHT - float(y.places(np.array(level.value))), level) for level in chart.levels],
        _marks(chart.marks, x),
    )


def thin(steps: np.ndarray, values: np.ndarray, max_bins: int = MAX_BINS) -> Bins:
    """At most so many bins of equally many steps; few points stay as they are."""
    if len(steps) <= max_bins:
        return Bins(steps, values, values, values)
    number = (steps - steps[0]) * max_bins // (steps[-1] - steps[0] + 1)
    begins = np.flatnonzero(np.diff(number, prepend=-1))
    counts = np.diff(begins, append=len(steps))
    return Bins(
        steps[begins + counts - 1],
        np.add.reduceat(values, begins) / counts,
        np.minimum.reduceat(values, begins),
        np.maximum.reduceat(values, begins),
    )


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place, of fewer at the beginning."""
    totals = np.cumsum(np.concatenate([[0.0], values]))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - window)
    return np.asarray((totals[last] - totals[first]) / (last - first))


def window(bins: Bins) -> int:
    return max(1, int(len(bins.mean) * SMOOTHED_SHARE))


def nice_ticks(first: float, last: float, number: int) -> list[float]:
    """About so many round values between two others."""
    rough = (last - first) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(index * step, 12) for index in range(math.ceil(first / step), math.floor(last / step) + 1)]


def log_ticks(first: float, last: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them if few; round values where not even two of these are in between."""
    powers = [10.0**power for power in range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)]
    for factors in ((1,), (1, 2, 5)):
        ticks = [factor * power for power in powers for factor in factors if first <= factor * power <= last]
        if len(ticks) > 2:
            return ticks[:: math.ceil(len(ticks) / 6)]
    return nice_ticks(first, last, 4)


def short(value: float, digits: int = 3) -> str:
    """A number in few characters: 12.3k, 417, 4e-5."""
    size, suffix = next(((size, suffix) for size, suffix in SUFFIXES if abs(value) >= size), (1.0, ""))
    value = value / size
    text = f"{value:.{digits}g}"
    return (text if abs(value) < 1 else f"{float(text):g}").replace("e-0", "e-") + suffix


def _clean(curve: Curve, log: bool) -> Curve:
    steps, values = np.asarray(curve.steps), np.asarray(curve.values, dtype=np.float64)
    kept = np.isfinite(values) & ((values > 0) | (not log))
    return Curve(curve.name, steps[kept], values[kept], curve.colour, curve.is_total)


def _stack(bins: list[Bins]) -> list[Bins]:
    tops = np.cumsum([each.mean for each in bins], axis=0)
    return [Bins(each.steps, top, top, top) for each, top in zip(bins, tops, strict=True)]


def _x_scale(bins: list[Bins]) -> Scale:
    first = min((int(each.steps[0]) for each in bins), default=0)
    last = max((int(each.steps[-1]) for each in bins), default=0)
    return Scale(first, max(last, first + 1), PLOT_WIDTH)


def _y_scale(chart: Chart, bins: list[Bins]) -> Scale:
    levels = [level.value for level in chart.levels]
    low = min([*(float(each.low.min()) for each in bins), *levels], default=1.0)
    high = max([*(float(each.high.max()) for each in bins), *levels], default=1.0)
    if chart.log:
        margin = (high / low) ** 0.05 if high > low else 1.1
        return Scale(low / margin, high * margin, PLOT_HEIGHT, log=True)
    lowest, highest = (0.0, None) if chart.stacked else chart.y_range
    margin = 0.05 * (high - (low if lowest is None else lowest)) or 0.05 * abs(high) or 1.0
    first = low - margin if lowest is None else lowest
    last = high + margin if highest is None else highest
    return Scale(first, max(last, first + 1e-12), PLOT_HEIGHT)


def _y_ticks(y: Scale) -> list[float]:
    return log_ticks(y.first, y.last) if y.log else nice_ticks(y.first, y.last, 4)


def _ticks(scale: Scale, values: list[float]) -> list[tuple[float, str]]:
    """With as many digits as they have."""
    digits = next((n for n in range(1, 9) if all(math.isclose(float(f"{v:.{n}g}"), v) for v in values)), 9)
    places = scale.places(np.array(values))
    return [(float(place), short(value, digits)) for place, value in zip(places, values, strict=True)]


def _line(curve: Curve, bins: Bins, x: Scale, y: Scale) -> Line:
    means = smoothed(bins.mean, window(bins))
    points = _points(bins.steps, means, x, y)
    band = ""
    if (bins.low < means).any() or (bins.high > means).any():
        band = f"{_points(bins.steps, bins.low, x, y)} {_points(bins.steps[::-1], bins.high[::-1], x, y)}"
    dots = [tuple(map(float, point.split(","))) for point in points.split()] if len(means) <= MAX_DOTS else []
    return Line(curve, points, band, dots, short(float(means[-1])))  # type: ignore[arg-type]


def _area(curve: Curve, bins: Bins, floor: np.ndarray, x: Scale, y: Scale) -> Line:
    """Between the layer below and the own top."""
    top, bottom = (smoothed(values, window(bins)) for values in (bins.mean, floor))
    band = f"{_points(bins.steps, top, x, y)} {_points(bins.steps[::-1], bottom[::-1], x, y)}"
    return Line(curve, "", band, [], short(float(top[-1] - bottom[-1])))


def _points(steps: np.ndarray, values: np.ndarray, x: Scale, y: Scale) -> str:
    across, up = x.places(steps), y.places(values)
    return " ".join(f"{a:.1f},{PLOT_HEIGHT - b:.1f}" for a, b in zip(across, up, strict=True))


def _marks(marks: Sequence[Mark], x: Scale) -> list[tuple[float, Mark]]:
    """Inside the axis; of those that would fall on one another, the first of a kind."""
    inside = [mark for mark in marks if x.first <= mark.step <= x.last]
    places = x.places(np.array([mark.step for mark in inside])).round().tolist()
    placed: dict[tuple[float, str], Mark] = {}
    for place, mark in zip(places, inside, strict=True):
        placed.setdefault((place, mark.kind), mark)
    return [(place, mark) for (place, _), mark in placed.items()]
