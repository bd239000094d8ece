"""The page of a run: sections of charts, tables, samples, and the template that they go into."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.inspecting.templates import template_environment
from trainer.reporting import headline
from trainer.reporting.charts import Chart, Curve, Drawing, Level, Mark, draw, short
from trainer.reporting.events import MOST_SHOWN as MOST_EVENTS
from trainer.reporting.history import History
from trainer.reporting.panels import ALL_SOURCES, MANY, SECTIONS, Panel, Section
from trainer.reporting.run_record import SPEED_STEPS, RunRecord
from trainer.reporting.samples import read_samples

NUM_COLOURS = 8
"""--c0 to --c7 in the template."""
MOST_CURVES, MOST_REASONS, MOST_CHARACTERS = 12, 100, 300
MARKED = {"start": "restart", "step_discarded": "step thrown away", "rollback": "rollback"}
"""Events that are vertical lines in every chart, and what they are called."""
IN_EVERY_EVENT = ("attempt", "step", "event")


@dataclass(frozen=True)
class ShownSection:
    section: Section
    drawings: list[Drawing]


@dataclass(frozen=True)
class SourceLine:
    """One source in the table, texts; "" where the run does not tell."""

    name: str
    colour: str
    cells: list[str]


def render(run: RunRecord, refresh_s: float | None) -> str:
    """The page. refresh_s: it loads itself again after so long; None = never."""
    samples_of, samples = read_samples(run.run_dir / "samples")
    template = template_environment(Path(__file__).parent).get_template("page.html.j2")
    return template.render(
        run=run,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        refresh_ms=None if refresh_s is None else max(1, round(1000 * refresh_s)),
        state=headline.state(run),
        progress=headline.progress(run),
        figures=headline.figures(run),
        warnings=headline.warnings(run),
        sections=[ShownSection(section, _drawings(section, run)) for section in SECTIONS],
        marked={kind: title for kind, title in MARKED.items() if _marks_of(run, kind)},
        samples_of=headline.step_of(samples_of),
        samples=samples,
        sources=_source_lines(run),
        skips=_skips(run),
        most_skips=MOST_REASONS,
        events=[(event, _facts(event)) for event in reversed(run.events.newest)],
        num_events=run.events.counts.total(),
        most_events=MOST_EVENTS,
    )


def _drawings(section: Section, run: RunRecord) -> list[Drawing]:
    drawings = (draw(_chart(panel, run)) for panel in section.panels)
    return [drawing for drawing in drawings if drawing.lines]


def _chart(panel: Panel, run: RunRecord) -> Chart:
    curves = _stacked(panel, run.metrics) if panel.whole else _curves(panel, run)
    return Chart(
        panel.title,
        curves,
        panel.unit,
        panel.log,
        panel.y_range,
        _levels(panel, run, curves),
        [mark for kind in MARKED for mark in _marks_of(run, kind)],
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
    """A source has one colour in all charts."""
    if name == ALL_SOURCES:
        return "var(--ink)"
    sources = list(run.weights)
    return f"var(--c{(sources.index(name) if name in sources else number) % NUM_COLOURS})"


def _stacked(panel: Panel, history: History) -> list[Curve]:
    """The parts at every step of the whole, 0 where one is missing, and what is left of the whole."""
    steps, left = history.curve(panel.whole)
    curves = []
    for number, (name, label) in enumerate(panel.metrics.items()):
        part = np.zeros_like(left)
        own_steps, values = history.curve(name)
        is_known = np.isin(own_steps, steps)
        part[np.searchsorted(steps, own_steps[is_known])] = values[is_known]
        left = left - part
        if len(own_steps):
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


def _marks_of(run: RunRecord, kind: str) -> list[Mark]:
    steps = run.events.steps.get(kind, [])
    return [Mark(step, kind, f"{MARKED[kind]} at step {step:,}") for step in (steps[1:] if kind == "start" else steps)]


def _source_lines(run: RunRecord) -> list[SourceLine]:
    """asked, came, documents, epochs, text loss, image loss, skipped."""
    metrics, skipped = run.metrics, _skipped_by_source(run)

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return [
        SourceLine(
            name,
            f"var(--c{number % NUM_COLOURS})",
            [
                f"{share:.1%}",
                cell(metrics.last(f"mixture/{name}"), "{:.1%}"),
                cell(run.metrics.latest.get("samples", {}).get(name), "{:,}"),
                cell(metrics.last(f"epoch/{name}"), "{:.2f}"),
                cell(metrics.recent(f"loss/text/{name}", SPEED_STEPS), "{:.4g}"),
                cell(metrics.recent(f"loss/image/{name}", SPEED_STEPS), "{:.4g}"),
                cell(skipped.get(name), "{:,}"),
            ],
        )
        for number, (name, share) in enumerate(run.weights.items())
    ]


def _skips(run: RunRecord) -> list[tuple[str, str, int]]:
    """Source, reason, samples so far; the most first."""
    counts: Mapping[str, int] = run.metrics.latest.get("skips", {})
    lines = [(*name.partition(": ")[::2], count) for name, count in counts.items()]
    return sorted(lines, key=lambda line: -line[2])


def _skipped_by_source(run: RunRecord) -> dict[str, int]:
    totals: dict[str, int] = {}
    for source, _, count in _skips(run):
        totals[source] = totals.get(source, 0) + count
    return totals


def _facts(event: dict[str, Any]) -> str:
    facts = (f"{name} {value}" for name, value in event.items() if name not in IN_EVERY_EVENT)
    text = ", ".join(facts)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"
