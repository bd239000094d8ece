"""Start a tiny job through the launcher, do something to it while it runs, and see what is left."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.supervise import read_rank_pids
from tests.trainer.tiny_job import REPOSITORY, environment, overrides

TIMEOUT_S = 240.0
MARK = "EMU_TEST_RUN"
"""In the environment of every process of a run, so that none is overlooked."""


@dataclass
class Ended:
    """How a run has ended. attempts: its starts."""

    code: int
    output: str
    run_dir: Path

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]

    @property
    def attempts(self) -> int:
        return int((self.run_dir / "attempt").read_text())

    @property
    def exit(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "exit.json").read_text())

    def event(self, kind: str) -> dict[str, Any]:
        return next(event for event in self.events if event["event"] == kind)


@dataclass
class ChaosRun:
    """A job of tests/chaos/job.py under `python -m launch.deepspeed`."""

    run_dir: Path
    corpora: Path
    tokenizer: Path
    settings: list[str]
    fault: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    num_procs: int = 2
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def run(
        self,
        deed: Callable[[ChaosRun, subprocess.Popen[str]], None] | None = None,
        bare: bool = False,
        patience_s: float = 10.0,
    ) -> Ended:
        """From start to end; `deed` is done while it runs. AssertionError if a process is left patience_s after that.

        bare: under DeepSpeed's own launcher, without a fault.
        """
        arguments = [a for a in overrides(self.corpora, self.tokenizer, self.run_dir, *self.settings)
                     if not a.startswith("run_dir=")]  # fmt: skip
        command = [sys.executable, "-m", "launch.deepspeed", "--num-procs", str(self.num_procs)]
        command += ["--run-dir", str(self.run_dir), *self.flags, "--module", "tests.chaos.job", "--", *arguments]
        if bare:
            command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={self.num_procs}"]
            command += ["--hostfile=", "trainer/pretrain.py", f"run_dir={self.run_dir}", *arguments]
        env = environment(
            EMU_DATA=str(self.corpora), EMU_FAULT=json.dumps(self.fault), DS_ACCELERATOR="cpu", **{MARK: self.mark}
        )
        log = self.run_dir.with_suffix(".log")
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=env, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            )  # fmt: skip
            try:
                if deed is not None:
                    deed(self, process)
                process.wait(timeout=TIMEOUT_S)
                left = self.wait_for_none_left(patience_s)
            finally:
                for pid in self.processes():
                    os.kill(pid, signal.SIGKILL)
        assert not left, f"processes are left: {left}\n{log.read_text()[-3000:]}"
        return Ended(process.returncode, log.read_text(), self.run_dir)

    def processes(self) -> list[int]:
        """Of this run, the launcher and loader workers included."""
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                    if state not in "ZX" and wanted in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
                except (OSError, IndexError):
                    continue
        return found

    def wait_for_none_left(self, seconds: float) -> list[str]:
        """Command lines of what is still there after that time."""
        deadline = time.monotonic() + seconds
        while (pids := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}" for pid in pids]

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """False conditions of a run that ends are no error: the deed came too late."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition() and process.poll() is None:
            assert time.monotonic() < deadline, self.run_dir.with_suffix(".log").read_text()[-3000:]
            time.sleep(0.002)

    def num_steps(self) -> int:
        """Lines in metrics.jsonl so far."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_writing(self) -> bool:
        return any((self.run_dir / "checkpoints").glob("*.partial/*"))

    def ranks(self) -> list[int]:
        return list(read_rank_pids(self.run_dir).values())
