"""Curves over the steps: thinning, scales, ticks and places."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.reporting.charts import (
    MAX_BINS,
    PLOT_HEIGHT,
    PLOT_WIDTH,
    Chart,
    Curve,
    Level,
    Mark,
    draw,
    log_ticks,
    nice_ticks,
    short,
    smoothed,
    thin,
)


def points(text: str) -> np.ndarray:
    return np.array([[float(part) for part in point.split(",")] for point in text.split()])


def test_few_points_stay_as_they_are() -> None:
    steps, values = np.arange(MAX_BINS), np.arange(MAX_BINS) * 1.0
    assert thin(steps, values).mean is values


def test_thinning_keeps_means_and_the_spike_of_one_step() -> None:
    steps = np.concatenate([np.arange(1, 50_001), np.arange(80_001, 100_001)])  # and a gap
    values = np.ones(len(steps))
    values[12_345] = 900.0
    values[23_456] = -7.0
    bins = thin(steps, values)
    assert len(bins.steps) <= MAX_BINS and (np.diff(bins.steps) > 0).all() and bins.steps[-1] == 100_000
    assert (bins.high.max(), bins.low.min()) == (900.0, -7.0)
    assert (bins.mean != 1.0).sum() == 2
    spiked = int(bins.high.argmax())
    assert bins.steps[spiked - 1] < 12_346 <= bins.steps[spiked]


def test_the_spike_is_in_the_drawing() -> None:
    """The band reaches up to it, although the mean of its bin and the smoothed line do not."""
    values = np.ones(100_000)
    values[54_321] = 10.0
    [line] = draw(Chart("loss", [Curve("text", np.arange(100_000), values, "red")])).lines
    tops = PLOT_HEIGHT - points(line.band)[:, 1]
    heights = PLOT_HEIGHT - points(line.points)[:, 1]
    assert tops.max() > 0.9 * PLOT_HEIGHT and heights.max() < 0.1 * PLOT_HEIGHT
    assert len(points(line.points)) + len(points(line.band)) <= 3 * MAX_BINS


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    values = np.random.default_rng(0).standard_normal(40)
    expected = [np.mean(values[max(0, n - 14) : n + 1]) for n in range(40)]
    np.testing.assert_allclose(smoothed(values, 15), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("log", [False, True])
def test_points_are_where_the_axes_say(log: bool) -> None:
    drawing = draw(Chart("loss", [Curve("text", [100, 200], [1.0, 100.0], "red")], log=log, y_range=(0.0, None)))
    (left, low), (right, high) = points(drawing.lines[0].points)
    assert (left, right) == (0.0, PLOT_WIDTH)
    ticks = {text: place for place, text in drawing.y_ticks}
    assert ticks["100"] == pytest.approx(high, abs=0.06)
    if log:
        assert ticks["1"] == pytest.approx(low, abs=0.06)
        assert ticks["10"] == pytest.approx((low + high) / 2, abs=0.06)
    else:
        assert ticks["0"] == pytest.approx(PLOT_HEIGHT)
        assert (PLOT_HEIGHT - low) / (PLOT_HEIGHT - high) == pytest.approx(0.01, abs=0.001)


def test_what_cannot_be_drawn_is_left_out() -> None:
    curves = [
        Curve("none", [], [], "red"),
        Curve("negative", [1, 2], [-1.0, 0.0], "red"),
        Curve("broken", [1, 2, 3], [float("nan"), 2.0, float("inf")], "red"),
    ]
    [line] = draw(Chart("loss", curves, log=True)).lines
    assert line.curve.name == "broken" and len(line.dots) == 1
    assert draw(Chart("nothing", [])).lines == []


def test_layers_stand_on_one_another() -> None:
    curves = [Curve(name, [1, 2], [1.0, 1.0], "red") for name in ("forward", "backward")]
    lower, upper = (points(line.band) for line in draw(Chart("time", curves, stacked=True)).lines)
    floor, middle = PLOT_HEIGHT, PLOT_HEIGHT - (PLOT_HEIGHT / 2 / 1.05)
    np.testing.assert_allclose(lower[:, 1], [middle, middle, floor, floor], atol=0.1)
    np.testing.assert_allclose(upper[2:, 1], [middle, middle], atol=0.1)


def test_levels_and_marks_are_placed_and_many_marks_are_few_lines() -> None:
    marks = [Mark(step, "step_discarded", f"step {step}") for step in range(-5, 100_000)]
    curve = Curve("text", [0, 100_000], [0.0, 1.0], "red")
    drawing = draw(Chart("loss", [curve], levels=[Level(2.0, "red", "limit")], marks=marks, y_range=(0.0, None)))
    assert drawing.levels[0][0] == pytest.approx(PLOT_HEIGHT * (1 - 2 / 2.1))
    assert 300 < len(drawing.marks) <= PLOT_WIDTH + 1
    assert all(0 <= place <= PLOT_WIDTH for place, _ in drawing.marks)


def test_ticks_are_round_and_say_their_value() -> None:
    assert nice_ticks(0.0, 1.0, 4) == [0.0, 0.5, 1.0]
    assert nice_ticks(1018.0, 1161.0, 4) == [1050.0, 1100.0, 1150.0]
    assert log_ticks(0.5, 2000.0) == [1.0, 10.0, 100.0, 1000.0]
    assert log_ticks(0.09, 6.0) == [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    assert log_ticks(2.31, 2.44) == [2.35, 2.4]
    drawing = draw(Chart("loss", [Curve("text", [1000, 1200], [2.31, 2.44], "red")], log=True))
    assert [text for _, text in drawing.y_ticks] == ["2.35", "2.4"]
    assert [text for _, text in drawing.x_ticks] == ["1k", "1.05k", "1.1k", "1.15k", "1.2k"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (417, "417"), (12_345, "12.3k"), (1.5e6, "1.5M"), (4e-5, "4e-5"), (-0.25, "-0.25")]
)
def test_numbers_in_few_characters(value: float, text: str) -> None:
    assert short(value) == text
