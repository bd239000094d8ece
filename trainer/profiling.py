"""A profile on demand: of the step that monitor.profile_step names, or of the next one after USR2 to a rank.

<run>/profile/step-00000100-rank-00000.json.gz   torch's trace, for chrome://tracing or ui.perfetto.dev
<run>/profile/step-00000100-rank-00000.txt       operations by time and by memory
<run>/profile/step-00000100-rank-00000.pickle    the CUDA allocator's history, for pytorch.org/memory_viz
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)

NUM_ROWS = 40
"""Operations in a table."""


class Profiler:
    """step: to be profiled on rank 0, 0 = none. A signal asks for the next step of the rank that gets it."""

    def __init__(self, run_dir: Path, rank: int, step: int) -> None:
        self._folder, self._rank, self._step = run_dir / "profile", rank, step
        self._asked = False
        signal.signal(signal.SIGUSR2, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around the making of `step`; a profile is written if one was asked for. Its failure does not end the run."""
        if not (self._asked or (step == self._step and self._rank == 0)):
            yield
            return
        self._asked = False
        on_device = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
        if on_device:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        with profile(activities=activities, profile_memory=True, record_shapes=True) as found:
            yield
            if on_device:
                torch.cuda.synchronize()
        try:
            path = self._write(found, step, on_device)
            log.warning("profile of step %d: %s", step, path)
        except Exception as error:
            log.warning("the profile of step %d was not written (%s)", step, error)

    def _write(self, found: profile, step: int, on_device: bool) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"step-{step:08d}-rank-{self._rank:05d}"
        trace = stem.with_suffix(".json.gz")
        found.export_chrome_trace(str(trace))
        averages, place = found.key_averages(), "device" if on_device else "cpu"
        tables = [averages.table(sort_by=f"self_{place}_{what}", row_limit=NUM_ROWS)
                  for what in ("time_total", "memory_usage")]  # fmt: skip
        stem.with_suffix(".txt").write_text("\n\n".join(tables) + "\n")
        if on_device:
            torch.cuda.memory._dump_snapshot(str(stem.with_suffix(".pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        return trace
