"""Where a rank is within a step, and how long each part of the step took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from data_pipelines.document import SampleKey

BETWEEN = "between phases"
DEVICE_PHASES = ("forward", "backward", "optimizer")
"""What the host only asks for; the device does it later."""


class Phases:
    """One per rank; the watchdog reads it from its own thread.

    name, since: the phase that runs now (phases do not nest) and when it began; step: the one that is being made, as
    last told; keys: samples of this rank in that step.
    """

    def __init__(self) -> None:
        self.name, self.since, self.step = "start", time.monotonic(), 0
        self.keys: list[list[SampleKey]] = []
        self._on_device = torch.cuda.is_available()
        self._host: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.name, self.since = name, time.monotonic()
        begin = self._mark() if name in DEVICE_PHASES else None
        try:
            yield
        finally:
            if begin is not None:
                self._events.append((name, begin, self._mark()))
            self._host[name] += time.perf_counter() - start
            self.name, self.since = BETWEEN, time.monotonic()

    def take(self, may_wait: bool) -> dict[str, float]:
        """Seconds by phase since the last call.

        On CUDA those of DEVICE_PHASES are the device's own, and reading them waits for it: without may_wait they are
        left out.
        """
        seconds, events = dict(self._host), self._events
        self._host, self._events = defaultdict(float), []
        if not self._on_device:
            return seconds
        seconds = {name: value for name, value in seconds.items() if name not in DEVICE_PHASES}
        if may_wait and events:
            events[-1][2].synchronize()
            for name, begin, end in events:
                seconds[name] = seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        return seconds

    def _mark(self) -> Any:
        """A CUDA event, or None without such a device."""
        if not self._on_device:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
