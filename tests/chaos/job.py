"""The trainer with a fault built in: ``python -m tests.chaos.job run_dir=... overrides``.

EMU_FAULT in the environment: {"kind", "rank", "step", "attempt"} as JSON. The fault strikes when that rank makes that
step, in that attempt only; slow_disk makes every write of a checkpoint take long.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from conf import run_cli
from models.emu import Emu
from models.weights import tensor_files
from trainer import pretrain, step

SLOW_WRITE_S = 0.005
FAULT: dict[str, Any] = json.loads(os.environ.get("EMU_FAULT", "{}"))
RANK = int(os.environ.get("RANK", "0"))
now: dict[str, int] = {}
"""attempt, step"""


def strikes(*kinds: str) -> bool:
    return FAULT.get("kind") in kinds and all(FAULT[name] == now[name] for name in ("step", "attempt")) and (
        FAULT["rank"] in (RANK, "all")
    )  # fmt: skip


def watch_steps(one_step: Any) -> Any:
    def wrapped(job: step.Job, flags: Any = tuple) -> Any:
        now["step"] = job.state.step + 1
        return one_step(job, flags)

    return wrapped


def fetch(stream: Any, number: int, fetch: Any = step.fetch) -> Any:
    if strikes("freeze"):
        time.sleep(3600)
    if strikes("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if strikes("dead_worker"):
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
    return fetch(stream, number)


def forward(self: Emu, *args: Any, forward: Any = Emu.forward, **kwargs: Any) -> dict[str, torch.Tensor]:
    outputs = forward(self, *args, **kwargs)
    if strikes("nan"):
        outputs["loss"] = outputs["loss"] * float("nan")
        outputs["text_loss"] = outputs["text_loss"] * float("nan")
    if strikes("spike"):
        outputs["text_loss"] = outputs["text_loss"] * 100
    if strikes("out_of_memory"):
        torch.empty(1 << 50)
    return outputs


def slow_write(*args: Any, write: Any = tensor_files._write) -> None:
    time.sleep(SLOW_WRITE_S)
    write(*args)


def main() -> None:
    pretrain.one_step = watch_steps(pretrain.one_step)
    step.fetch = fetch
    Emu.forward = forward  # type: ignore[method-assign]
    if FAULT.get("kind") == "slow_disk":
        tensor_files._write = slow_write
    run_steps = pretrain.run_steps

    def remember_attempt(config: Any, *args: Any) -> Any:
        now.update(attempt=int(Path(config.run_dir, "attempt").read_text()), step=0)
        return run_steps(config, *args)

    pretrain.run_steps = remember_attempt
    run_cli(pretrain.main)


if __name__ == "__main__":
    main()
