"""Run a function in several processes that form one gloo group."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0, init_group: bool = True
) -> list[Any]:
    """`function(*args)` in `world_size` fresh processes; its return values by rank.

    `function` is at the top level of an importable module; arguments and results are pickled. Each process has RANK,
    WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, one thread, and (unless init_group is false) a gloo group.
    The first error of any rank ends all and is raised here with its rank and traceback. A start with deepspeed
    costs seconds: let `function` run several cases.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        call = (function.__module__, function.__qualname__, args, init_group)
        (folder / "call.pickle").write_bytes(pickle.dumps(call))
        port = _free_port()
        logs = [(folder / f"{rank}.log").open("wb") for rank in range(world_size)]
        processes = [_start(folder, rank, world_size, port, log) for rank, log in enumerate(logs)]
        try:
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                # With its children: data loader workers outlive a killed parent.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for log in logs:
                log.close()
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _start(folder: Path, rank: int, world_size: int, port: int, log: Any) -> subprocess.Popen[bytes]:
    group = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    # Without a CUDA device DeepSpeed would ask an accelerator to be named; children import what the parent does.
    constant = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]),
    }
    environment = os.environ | constant | {key: str(value) for key, value in group.items()}
    command = [sys.executable, "-m", "tests.distributed.harness", str(folder)]
    return subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    """Return when all have ended well; raise at the first that has not, or after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while running := [rank for rank, process in enumerate(processes) if process.poll() is None]:
        if any(process.poll() for process in processes) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    failed = {rank: process.returncode for rank, process in enumerate(processes) if process.returncode}
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(folder: Path) -> None:
    """What each process does."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
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


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]))
