"""Run a function in several processes that form one gloo group."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from conf.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


PRELOADED = ["trainer.pretrain"]
"""What nearly every function imports, which takes ten seconds: once, in the process that the others are forked from."""
CONSTANT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Without a CUDA device DeepSpeed would ask an accelerator to be named."""
_forks = multiprocessing.get_context("forkserver")


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0, init_group: bool = True
) -> list[Any]:
    """`function(*args)` in `world_size` new processes; its return values by rank.

    `function` is at the top level of an importable module; arguments and results are pickled. Each process has RANK,
    WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, one thread, and (unless init_group is false) a gloo group.
    The first error of any rank ends all and is raised here with its rank and traceback.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        call = (function.__module__, function.__qualname__, args, init_group)
        (folder / "call.pickle").write_bytes(pickle.dumps(call))
        port = free_port()
        processes = [_start(folder, rank, world_size, port) for rank in range(world_size)]
        try:
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                process.kill()
                # With its children: data loader workers outlive a killed parent.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid or 0, signal.SIGKILL)
                process.join()
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _start(folder: Path, rank: int, world_size: int, port: int) -> BaseProcess:
    group = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    before = dict(os.environ)
    os.environ.update(CONSTANT)  # as they are when the first process is started, they count for the imports
    try:
        _forks.set_forkserver_preload(PRELOADED)
        environment = {**os.environ, **{key: str(value) for key, value in group.items()}}
        process = _forks.Process(target=_begin, args=(folder, rank, environment))
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def _wait(processes: list[BaseProcess], folder: Path, timeout_s: float) -> None:
    """Return when all have ended well; raise at the first that has not, or after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while running := [rank for rank, process in enumerate(processes) if process.exitcode is None]:
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    failed = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    if failed:
        # The ranks that waited for the first one fail too, a little later.
        first = min(failed, key=lambda rank: _error_time(folder, rank))
        raise RuntimeError(f"rank {first} failed with exit code {failed[first]}\n{_last_words(folder, first)}")
    if running:
        words = _last_words(folder, running[0])
        raise TimeoutError(f"ranks {running} had not ended after {timeout_s:.0f} s; rank {running[0]} said\n{words}")


def _error_time(folder: Path, rank: int) -> float:
    error = folder / f"{rank}.error"
    return error.stat().st_mtime_ns if error.exists() else float("inf")


def _last_words(folder: Path, rank: int) -> str:
    error, log = folder / f"{rank}.error", folder / f"{rank}.log"
    return error.read_text() if error.exists() else log.read_text(errors="replace")[-4000:]


def _begin(folder: Path, rank: int, environment: dict[str, str]) -> None:
    """Of a forked process: a session and an environment of its own, and a file that takes what it says."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _run_rank(folder, rank)


def _run_rank(folder: Path, rank: int) -> None:
    """What each process does."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        module, name, args, init_group = pickle.loads((folder / "call.pickle").read_bytes())
        if init_group:
            dist.init_process_group("gloo")
        result = getattr(import_module(module), name)(*args)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)
    # Skip the interpreter's teardown: groups of a rank that ended first make the others complain.
    sys.stdout.flush()
    os._exit(0)
