"""The tables of a run's page: sources, skipped samples, events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.reporting.panel_charts import source_colour
from trainer.reporting.run_record import SPEED_STEPS, RunRecord

MOST_CHARACTERS = 300
IN_EVERY_EVENT = ("attempt", "step", "event")


@dataclass(frozen=True)
class SourceLine:
    """cells: asked, came, documents, epochs, text loss, image loss, skipped; "" where the run does not tell."""

    name: str
    colour: str
    cells: list[str]


@dataclass(frozen=True)
class EventLine:
    step: str
    attempt: str
    name: str
    facts: str


def source_lines(run: RunRecord) -> list[SourceLine]:
    metrics, skipped = run.metrics, Counter[str]()
    for source, _, count in skip_lines(run):
        skipped[source] += count
    lines = []
    for number, (name, share) in enumerate(run.weights.items()):
        cells = [
            _cell(share, "{:.1%}"),
            _cell(metrics.last(f"mixture/{name}"), "{:.1%}"),
            _cell(metrics.latest.get("samples", {}).get(name), "{:,}"),
            _cell(metrics.last(f"epoch/{name}"), "{:.2f}"),
            _cell(metrics.recent(f"loss/text/{name}", SPEED_STEPS), "{:.4g}"),
            _cell(metrics.recent(f"loss/image/{name}", SPEED_STEPS), "{:.4g}"),
            _cell(skipped.get(name), "{:,}"),
        ]
        lines.append(SourceLine(name, source_colour(number), cells))
    return lines


def skip_lines(run: RunRecord) -> list[tuple[str, str, int]]:
    """Source, reason, samples so far; the most first."""
    counts: Mapping[str, int] = run.metrics.latest.get("skips", {})
    lines = [(*name.partition(": ")[::2], count) for name, count in counts.items()]
    return sorted(lines, key=lambda line: -line[2])


def event_lines(run: RunRecord) -> list[EventLine]:
    """The newest first."""
    return [
        EventLine(f"{event['step']:,}", str(event.get("attempt", "")), event["event"].replace("_", " "), _facts(event))
        for event in reversed(run.events.newest)
    ]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _facts(event: dict[str, Any]) -> str:
    facts = (f"{name} {value}" for name, value in event.items() if name not in IN_EVERY_EVENT)
    text = ", ".join(facts)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"
