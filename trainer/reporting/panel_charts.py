"""The charts of a run: what panels.py asks for, with the curves, limits and marks that the run has."""

from __future__ import annotations

import numpy as np

from trainer.reporting.charts import Chart, Curve, Drawing, Level, Mark, draw, short
from trainer.reporting.history import History
from trainer.reporting.panels import ALL_SOURCES, MANY, Panel, Section
from trainer.reporting.run_record import RunRecord

NUM_COLOURS = 8
"""--c0 to --c7 in page.html.j2."""
MOST_CURVES = 12
MARKED = {"start": "restart", "step_discarded": "step thrown away", "rollback": "rollback"}
"""Events that are vertical lines in every chart, and what they are called."""


def draw_section(section: Section, run: RunRecord, marks: list[Mark]) -> list[Drawing]:
    """Charts without a curve are left out."""
    drawings = (draw(_chart(panel, run, marks)) for panel in section.panels)
    return [drawing for drawing in drawings if drawing.lines]


def marks_of(run: RunRecord) -> list[Mark]:
    """The first start is none."""
    steps = {kind: run.events.steps.get(kind, []) for kind in MARKED}
    steps["start"] = steps["start"][1:]
    return [Mark(step, kind, f"{title} at step {step:,}") for kind, title in MARKED.items() for step in steps[kind]]


def source_colour(number: int) -> str:
    """A source has one colour in all charts; number: its place in the configuration."""
    return f"var(--c{number % NUM_COLOURS})"


def _chart(panel: Panel, run: RunRecord, marks: list[Mark]) -> Chart:
    curves = _stacked(panel, run.metrics) if panel.whole else _curves(panel, run)
    return Chart(
        panel.title,
        curves,
        panel.unit,
        panel.log,
        panel.y_range,
        _levels(panel, run, curves),
        marks,
        stacked=bool(panel.whole),
    )


def _curves(panel: Panel, run: RunRecord) -> list[Curve]:
    found = []
    for pattern, label in panel.metrics.items():
        history = run.history(pattern)
        for name in history.names(pattern):
            shown = label or name.removeprefix(pattern.removesuffix("*"))
            steps, values = history.curve(name)
            if len(steps):
                found.append((shown, steps, values))
    if len(found) > MOST_CURVES:  # reasons of skips: those that are most
        found = sorted(found, key=lambda curve: -curve[2][-1])[:MOST_CURVES]
    return [
        Curve(shown, steps, values, _colour(run, shown, number), shown == ALL_SOURCES)
        for number, (shown, steps, values) in enumerate(found)
    ]


def _colour(run: RunRecord, name: str, number: int) -> str:
    if name == ALL_SOURCES:
        return "var(--ink)"
    sources = list(run.weights)
    return source_colour(sources.index(name) if name in sources else number)


def _stacked(panel: Panel, history: History) -> list[Curve]:
    """The parts at every step of the whole, and what is left of it."""
    steps, left = history.curve(panel.whole)
    curves = []
    for number, (name, label) in enumerate(panel.metrics.items()):
        part_steps, values = history.curve(name)
        if not len(steps) or not len(part_steps):
            continue
        part = np.interp(steps, part_steps, values)
        if name in panel.zero_if_missing:
            part = np.where(np.isin(steps, part_steps), part, 0.0)
        left = left - part
        curves.append(Curve(label, steps, part, f"var(--c{number})"))
    return [*curves, Curve("rest", steps, left.clip(min=0), f"var(--c{NUM_COLOURS - 1})")] if curves else []


def _levels(panel: Panel, run: RunRecord, curves: list[Curve]) -> list[Level]:
    levels = []
    if panel.limit:
        name, key = panel.limit
        value = run.setting(key)
        if isinstance(value, int | float) and value > 0:
            levels.append(Level(float(value), "var(--bad)", f"{name} {short(value)}"))
    if f"mixture{MANY}" in panel.metrics:
        colours = {curve.name: curve.colour for curve in curves}
        levels += [Level(share, colours[name]) for name, share in run.weights.items() if name in colours]
    if "validation/retrieval_at_1" in panel.metrics and (size := run.validation.last("validation/retrieval_of")):
        levels.append(Level(1 / size, "var(--soft)", f"chance, 1 of {size:.0f}"))
    return levels
