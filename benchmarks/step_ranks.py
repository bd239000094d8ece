"""Start the processes of the step benchmark, and read the clock in them."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.ports import free_port

PRELOADED = ["benchmarks.step_padded", "benchmarks.step_loop", "benchmarks.step_vision"]
"""Imported once, by a server that the processes are forked from: deepspeed takes long."""


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> Any:
    """`function(*args)` in fresh processes that share the cores, as a launcher starts them; what rank 0 returns."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as name:
        result = Path(name, "result")
        torch.multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        torch.multiprocessing.start_processes(
            _run_rank, (num_ranks, free_port(), result, function, args), nprocs=num_ranks, start_method="forkserver"
        )
        return pickle.loads(result.read_bytes())


def _run_rank(
    rank: int, num_ranks: int, port: int, path: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    result = function(*args)
    if rank == 0:
        path.write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def now() -> float:
    """Seconds on a clock, with all ranks there and nothing left to do on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.get_world_size() > 1:
        dist.barrier()
    return time.perf_counter()
