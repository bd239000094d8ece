"""Bytes of all tensors in this process over time, as torch's profiler reports every allocation on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "memory mark: "


@dataclass(frozen=True)
class Stretch:
    """From one mark to the next: bytes at the mark, and the most bytes from there on."""

    name: str
    begin: int
    peak: int


def mark(name: str) -> None:
    """A new stretch begins here. Only inside of `trace`."""
    gc.collect()  # so that cycles of what has been built do not count as if they were in use
    with record_function(PREFIX + name):
        pass


def trace(function: Callable[[], object]) -> list[Stretch]:
    """Run it; the stretches between its marks. Memory taken before counts as nothing, nor does giving it back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    timeline: list[tuple[int, str, int]] = []
    for event in events:
        if event.name() == "[memory]":
            timeline.append((event.start_ns(), "", event.nbytes()))
        elif event.name().startswith(PREFIX):
            timeline.append((event.start_ns(), event.name().removeprefix(PREFIX), 0))
    stretches: list[Stretch] = []
    level = 0
    for _, name, size in sorted(timeline, key=lambda entry: entry[0]):
        level += size
        if name:
            stretches.append(Stretch(name, level, level))
        elif stretches and level > stretches[-1].peak:
            stretches[-1] = Stretch(stretches[-1].name, stretches[-1].begin, level)
    return stretches
