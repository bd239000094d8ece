"""The page of a run: what goes into page.html.j2."""

from __future__ import annotations

import time
from dataclasses import dataclass

from data_pipelines.inspecting.templates import template_environment
from trainer.reporting import headline
from trainer.reporting.charts import TEMPLATES, Drawing
from trainer.reporting.events import MOST_SHOWN as MOST_EVENTS
from trainer.reporting.panel_charts import MARKED, draw_section, marks_of
from trainer.reporting.panels import SECTIONS, Section
from trainer.reporting.run_record import RunRecord
from trainer.reporting.samples import read_samples
from trainer.reporting.tables import event_lines, skip_lines, source_lines

MOST_REASONS = 100


@dataclass(frozen=True)
class ShownSection:
    section: Section
    drawings: list[Drawing]


def render(run: RunRecord, refresh_s: float | None) -> str:
    """The page. refresh_s: it loads itself again after so long; None = never."""
    marks = marks_of(run)
    samples_of, samples = read_samples(run.run_dir / "samples")
    template = template_environment(TEMPLATES).get_template("page.html.j2")
    return template.render(
        run=run,
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        refresh_ms=None if refresh_s is None else max(1, round(1000 * refresh_s)),
        state=headline.state(run),
        progress=headline.progress(run),
        figures=headline.figures(run),
        warnings=headline.warnings(run),
        sections=[ShownSection(section, draw_section(section, run, marks)) for section in SECTIONS],
        marked={mark.kind: MARKED[mark.kind] for mark in marks},
        samples_of=headline.step_of(samples_of),
        samples=samples,
        sources=source_lines(run),
        skips=skip_lines(run),
        most_skips=MOST_REASONS,
        events=event_lines(run),
        num_events=run.events.counts.total(),
        most_events=MOST_EVENTS,
    )
