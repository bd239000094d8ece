"""The numbers of a run, by metric and step, from metrics.jsonl or validation.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.reporting.lines import LineFile
from trainer.reporting.panels import matches

FIRST_CAPACITY = 1024
NOT_METRICS = ("attempt", "step", "time")


class History:
    """A column of numbers per metric, a place per step: of a step written twice the later attempt's line counts.

    Takes four bytes a metric and step, so that a million steps fit on a login node. step, attempt: of the newest line.
    latest: the newest dicts (counts so far, by key).
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        """prefix: comes before every metric's name."""
        self._file = LineFile(path)
        self._prefix = prefix
        self._columns: dict[str, np.ndarray] = {}
        self._attempts = np.zeros(FIRST_CAPACITY, dtype=np.int32)  # 0: no line of this step
        self.step: int | None = None
        self.attempt = 0
        self.latest: dict[str, dict[str, Any]] = {}
        self._times: list[float] = []  # of the newest attempt: its first line and its last
        self._num_lines = 0  # of the newest attempt

    def read_new(self) -> None:
        for record in self._file.read_new():
            if isinstance(record.get("step"), int) and isinstance(record.get("attempt"), int):
                self._put(record)

    def names(self, pattern: str) -> list[str]:
        """Metrics that a name of `Panel.metrics` stands for, in the order in which they came."""
        return [name for name in self._columns if matches(pattern, name)]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values where the metric has a finite one; empty for a metric that never came."""
        if name not in self._columns:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        steps = np.flatnonzero(np.isfinite(self._columns[name]))
        return steps, self._columns[name][steps].astype(np.float64)

    def last(self, name: str) -> float | None:
        _, values = self.curve(name)
        return float(values[-1]) if len(values) else None

    def recent(self, name: str, num_steps: int) -> float | None:
        """Mean over the last so many of its values."""
        _, values = self.curve(name)
        return float(values[-num_steps:].mean()) if len(values) else None

    @property
    def last_time(self) -> float | None:
        """Of the newest line, in Unix seconds; None where it does not tell."""
        return self._times[-1] if self._times else None

    def seconds_per_step(self) -> float | None:
        """At the mean pace of the newest attempt, checkpoints and all; None before its second step."""
        if self._num_lines < 2 or len(self._times) < 2:
            return None
        return (self._times[-1] - self._times[0]) / (self._num_lines - 1)

    def _put(self, record: dict[str, Any]) -> None:
        step, attempt = record["step"], record["attempt"]
        self._follow(step, attempt, record.get("time"))
        self._make_room(step)
        if attempt < self._attempts[step]:
            return
        if self._attempts[step]:  # what the later line does not have is not known of this step
            for column in self._columns.values():
                column[step] = np.nan
        self._attempts[step] = attempt
        for name, value in record.items():
            if isinstance(value, dict):
                self.latest[name] = value
                for key, number in value.items():
                    self._set(f"{name}/{key}", step, number)
            elif name not in NOT_METRICS:
                self._set(name, step, value)

    def _follow(self, step: int, attempt: int, now: float | None) -> None:
        if attempt > self.attempt:
            self._times, self._num_lines = [], 0
        self.step, self.attempt = step, attempt
        self._num_lines += 1
        if now is not None:
            self._times = [*self._times[:1], now]

    def _set(self, name: str, step: int, value: Any) -> None:
        if not isinstance(value, int | float):  # lists and what is missing
            return
        column = self._columns.get(self._prefix + name)
        if column is None:
            column = np.full(len(self._attempts), np.nan, dtype=np.float32)
            self._columns[self._prefix + name] = column
        column[step] = value

    def _make_room(self, step: int) -> None:
        size = len(self._attempts)
        if step < size:
            return
        more = max(size, step + 1 - size)
        self._attempts = np.pad(self._attempts, (0, more))
        for name, column in self._columns.items():
            self._columns[name] = np.pad(column, (0, more), constant_values=np.nan)
