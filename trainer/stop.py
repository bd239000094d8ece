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

    def agreed(self, topology: Topology, device: torch.device) -> bool:
        """Whether any rank was asked: signals reach ranks at different times, and all must stop at the same step."""
        asked = bool(self.received) or _launcher_is_gone()
        if topology.world_size == 1:
            return asked
        flag = torch.tensor([int(asked)], device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


def _launcher_is_gone() -> bool:
    """launch.deepspeed names itself in the environment; ranks that outlive it would train on as orphans."""
    launcher = os.environ.get("EMU_LAUNCHER_PID")
    return launcher is not None and not Path(f"/proc/{launcher}").exists()
