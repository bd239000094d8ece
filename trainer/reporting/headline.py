"""How the run goes, in a few figures and warnings."""

from __future__ import annotations

import time
from dataclasses import dataclass

from trainer.reporting.charts import short
from trainer.reporting.run_record import SPEED_STEPS, RunRecord

STOPPED_BY_SIGNAL = 75
SLOW_DATA = 0.1
"""Waiting for data for more than this share of a step is worth a warning."""


@dataclass(frozen=True)
class State:
    """colour: good | warning | bad, classes of the style sheet."""

    name: str
    colour: str
    note: str


@dataclass(frozen=True)
class Figure:
    title: str
    value: str
    note: str = ""


def state(run: RunRecord) -> State:
    if run.ending is not None:
        colour = {0: "good", STOPPED_BY_SIGNAL: "warning"}.get(run.ending.code, "bad")
        return State(f"ended, code {run.ending.code}", colour, run.ending.reason)
    silent = run.silent_seconds()
    if silent is not None:
        return State(f"silent for {duration(silent)}", "bad", "no exit.json and no new step: killed, or hanging")
    if run.metrics.step is None:
        return State("starting", "warning", "no step yet")
    return State("running", "good", "")


def progress(run: RunRecord) -> float:
    """Share of the steps."""
    total = run.setting("total_steps")
    return min(1.0, run.step / total) if total else 0.0


def figures(run: RunRecord) -> list[Figure]:
    """What the run does not have is left out."""
    return [figure for figure in (*_position(run), *_speeds(run), *_now(run)) if figure is not None]


def _position(run: RunRecord) -> list[Figure | None]:
    total, pace = run.setting("total_steps"), run.seconds_per_step()
    goes_on = run.ending is None and run.silent_seconds() is None
    left = (total - run.step) * pace if total and pace and goes_on else None
    _, start = run.events.last.get("start", (0, {}))
    return [
        Figure("step", f"{run.step:,}", f"of {total:,}" if total else ""),
        Figure("time left", duration(left), f"{pace:.3g} s a step") if left is not None else None,
        Figure("attempts", f"{start.get('attempt', 1)}", f"the last from step {start['step']:,}") if start else None,
        Figure("devices", f"{start.get('world_size')} x {start.get('device')}") if start else None,
        _checkpoint(run),
    ]


def _checkpoint(run: RunRecord) -> Figure:
    newest = run.checkpoint()
    if newest is None:
        return Figure("checkpoint", "none", "yet")
    name, written = newest
    return Figure("checkpoint", step_of(name), f"{duration(time.time() - written)} ago")


def _speeds(run: RunRecord) -> list[Figure | None]:
    metrics = run.metrics
    seen = {name: metrics.curve(name)[1].sum() for name in ("tokens", "images")}
    mfu = metrics.recent("mfu", SPEED_STEPS)
    speeds: list[Figure | None] = []
    for name in ("tokens", "images"):
        speed = metrics.recent(f"{name}_per_second", SPEED_STEPS)
        if speed is not None:
            speeds.append(Figure(f"{name} / s", short(speed), f"{short(seen[name])} seen"))
    wait = _data_wait(run)
    return [
        *speeds,
        Figure("MFU", f"{100 * mfu:.1f} %", "of the device's peak") if mfu is not None else None,
        Figure("data wait", f"{100 * wait:.1f} %", "of a step's time") if wait is not None else None,
    ]


def _now(run: RunRecord) -> list[Figure | None]:
    losses = {name: run.metrics.recent(f"loss/{name}", SPEED_STEPS) for name in ("text", "image")}
    return [Figure(f"{name} loss", f"{loss:.4g}") for name, loss in losses.items() if loss is not None]


def _data_wait(run: RunRecord) -> float | None:
    waited, step = (run.metrics.recent(f"seconds/{name}", SPEED_STEPS) for name in ("data_wait", "step"))
    return waited / step if waited is not None and step else None


def warnings(run: RunRecord) -> list[str]:
    """What someone has to look at, a sentence each."""
    found, last, counts = [], run.events.last, run.events.counts
    if run.events.is_open("collapse", "recovery"):
        found.append(
            f"The visual embeddings of different pictures are alike since step {last['collapse'][1]['step']:,}: "
            "the image loss means nothing now."
        )
    if run.events.is_open("checkpoint_failed", "checkpoint"):
        found.append(f"The last checkpoint was not written: {last['checkpoint_failed'][1].get('reason')}")
    if counts["step_discarded"]:
        found.append(f"Steps thrown away: {counts['step_discarded']:,}, rollbacks: {counts['rollback']:,}.")
    wait = _data_wait(run)
    if wait is not None and wait > SLOW_DATA:
        found.append(f"{100 * wait:.0f} % of a step is waiting for data: raise data.num_workers, or look at the store.")
    return found


def step_of(folder: str) -> str:
    """step-00012000 as 12,000; another name as it is."""
    digits = folder.removeprefix("step-")
    return f"{int(digits):,}" if digits.isdecimal() else folder


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(0, seconds):.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if days else f"{minutes // 60} h {minutes % 60:02} min"
