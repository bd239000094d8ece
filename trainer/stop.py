"""A request to stop: one signal finishes the step and checkpoints, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from trainer.topology import Topology

STOPPED_BY_SIGNAL = 75
"""Exit code of a run that a signal stopped after a checkpoint: start it again to go on."""


class StopRequest:
    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number

    def is_asked(self) -> bool:
        return bool(self.received) or _launcher_is_gone()


def any_rank(flags: list[bool], topology: Topology, device: torch.device) -> list[bool]:
    """Which flags any rank has set: a signal, say, reaches ranks at different times, and all must stop at one step."""
    if topology.world_size == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def _launcher_is_gone() -> bool:
    """launch.deepspeed names itself in the environment; ranks that outlive it would train on as orphans."""
    launcher = os.environ.get("EMU_LAUNCHER_PID")
    return launcher is not None and not Path(f"/proc/{launcher}").exists()
