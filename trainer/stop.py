"""A request to stop: one signal finishes the step and checkpoints, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

STOPPED_BY_SIGNAL = 75
"""Exit code of a run that a signal or its time limit stopped after a checkpoint: start it again to go on."""
START_AGAIN = 76
"""Exit code of a run that something other than its configuration has ended: a rank stood still, a loader worker died.
The launchers start it again by themselves."""


class StopRequest:
    """after_minutes: the run's own limit, counted from now; 0 = none."""

    def __init__(self, after_minutes: float = 0.0) -> None:
        self.received = 0
        self._deadline = time.monotonic() + 60 * after_minutes if after_minutes else float("inf")
        self._runner = _bare_runner()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number

    @property
    def reason(self) -> str:
        return "by its time limit" if time.monotonic() > self._deadline else "by a signal"

    def is_asked(self) -> bool:
        return bool(self.received) or time.monotonic() > self._deadline or self._launcher_is_gone()

    def _launcher_is_gone(self) -> bool:
        """launch.deepspeed names itself in the environment; ranks that outlive it would train on as orphans."""
        launcher = os.environ.get("EMU_LAUNCHER_PID") or self._runner
        return launcher is not None and not Path(f"/proc/{launcher}").exists()


def _bare_runner() -> str | None:
    """Process number of the `deepspeed` command that has started this rank, two processes up: a signal to it ends it
    and leaves the rest."""
    parent = Path(f"/proc/{os.getppid()}")
    try:
        if b"deepspeed.launcher.launch" not in (parent / "cmdline").read_bytes():
            return None
        return (parent / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return None
