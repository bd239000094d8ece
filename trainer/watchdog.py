"""A run that stands still ends itself, and says where: every rank's phase, samples and stack, and who held it up.

<run>/hang/attempt-3/rank-00001.json   step, phase, seconds in it, sample keys, stacks of all threads of that rank
<run>/hang/attempt-3/rank-00001.txt    the interpreter's own dump, of a rank that cannot even run this thread
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from trainer import run_folder
from trainer.phases import Phases
from trainer.stop import START_AGAIN
from trainer.topology import Topology

POLL_S = 0.2
GATHER_S = 3.0
"""So long a rank waits for the others' reports: their clocks ran out at nearly the same time."""
LAST_RESORT_S = 10.0
"""So much later a process that holds the interpreter's lock is ended from outside of it."""
ORDER = ("start", "between phases", "data_wait", "prepare", "forward", "backward", "agree", "optimizer", "record",
         "checkpoint", "validation")  # fmt: skip
WAITING = ("distributed_c10d.py", "deepspeed/comm")
"""Files in whose functions a rank stands that waits for the others."""


class Watchdog:
    """One per rank, for the length of a with-block. It looks at `phases` from a thread.

    folder: of its reports. limit_s: between two calls of `beat`, which says that the rank has come further; 0 = it does
    nothing.
    """

    def __init__(self, run_dir: Path, folder: Path, topology: Topology, phases: Phases, limit_s: float) -> None:
        self._folder, self._run_dir, self._topology = folder, run_dir, topology
        self._phases, self._limit_s = phases, limit_s
        self._stopped = threading.Event()
        self._deadline = float("inf")
        self._file = None
        if limit_s:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._report_path(topology.rank).unlink(missing_ok=True)
            self._file = (self._folder / f"rank-{topology.rank:05d}.txt").open("w")

    def beat(self) -> None:
        """From the first call on, the next one must come in time."""
        if self._file is None:
            return
        self._deadline = time.monotonic() + self._limit_s
        faulthandler.dump_traceback_later(self._limit_s + GATHER_S + LAST_RESORT_S, exit=True, file=self._file)

    def rest(self) -> None:
        """Until the next `beat`."""
        if self._file is not None:
            self._deadline = float("inf")
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Watchdog:
        if self._file is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            Path(self._file.name).unlink()  # nothing has happened
            with contextlib.suppress(OSError):  # another rank's file is still there, or the folder of an attempt before
                self._folder.rmdir()
                self._folder.parent.rmdir()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        try:
            self._report()
        finally:  # whatever the disk says
            os._exit(START_AGAIN)

    def _report(self) -> None:
        rank = self._topology.rank
        report = describe(self._phases)
        temporary = self._report_path(rank).with_suffix(".partial")
        temporary.write_text(json.dumps(report, indent=1))
        temporary.replace(self._report_path(rank))
        time.sleep(GATHER_S)
        reports = self._reports()
        if rank == min(reports):
            sentence = blame(reports, self._topology.world_size, self._limit_s)
            run_folder.write_exit(self._run_dir, START_AGAIN, sentence)
            print(f"{sentence}; every rank's stack is in {self._folder}", file=sys.stderr, flush=True)

    def _report_path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _reports(self) -> dict[int, dict[str, Any]]:
        paths = {rank: self._report_path(rank) for rank in range(self._topology.world_size)}
        return {rank: json.loads(path.read_text()) for rank, path in paths.items() if path.exists()}


def describe(phases: Phases) -> dict[str, Any]:
    """Where this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = {
        names.get(number) or f"thread {number}": [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack(top)
        ]
        for number, top in sys._current_frames().items()
    }
    return {
        "step": phases.step,
        "phase": phases.name,
        "seconds": round(time.monotonic() - phases.since, 3),
        "keys": phases.keys,
        "stacks": stacks,
    }


def blame(reports: dict[int, dict[str, Any]], world_size: int, limit_s: float) -> str:
    """One sentence: the rank that held the others up. That is one without a report, else the least advanced one, else
    one that does not stand in a collective operation."""
    silent = [rank for rank in range(world_size) if rank not in reports]
    if silent:
        where = "did not answer at all (stopped, or stuck outside the interpreter)"
        return f"no step within {limit_s:g} s: {_ranks(silent)} {where}"
    progress = {rank: _progress(report) for rank, report in reports.items()}
    behind = [rank for rank in reports if progress[rank] == min(progress.values())]
    if len(behind) == world_size:
        behind = [rank for rank in behind if not _waits(reports[rank])] or behind
    first = reports[behind[0]]
    return (
        f"no step within {limit_s:g} s: {_ranks(behind)} stood in {first['phase']} of step {first['step']} for "
        f"{first['seconds']:.0f} s"
    )


def _progress(report: dict[str, Any]) -> tuple[int, int]:
    phase = report["phase"]
    return report["step"], ORDER.index(phase) if phase in ORDER else 0


def _waits(report: dict[str, Any]) -> bool:
    return any(part in line for line in report["stacks"].get("MainThread", []) for part in WAITING)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
