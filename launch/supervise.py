"""Watch the ranks of one start: pass stop signals on, notice the death of one, and leave nothing running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 0.1
ALONE_S, AT_ONCE_S = 5.0, 1.0
"""So long ranks may go on when one of them has died, and after a second signal."""


class StopRequest:
    """Remembers the latest stop signal, when the first came, and which ranks have it; installed for the life of the
    command.

    signum: None until there is one. count: signals so far.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.count = 0
        self.reached = set[int]()
        self._first = self._latest = 0.0
        self._delivered = 0
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._remember)

    def _remember(self, signum: int, _frame: object) -> None:
        self._latest = time.monotonic()
        self._first = self._first or self._latest
        self.signum = signum
        self.count += 1

    def begin_delivery(self) -> bool:
        """Whether a signal has come that no rank has yet; each goes to all of them anew."""
        if self._delivered == self.count:
            return False
        self._delivered, self.reached = self.count, set()
        return True

    def is_over(self, grace_s: float) -> bool:
        """Whether the ranks have had their time: grace_s after the first signal, hardly any after a second one."""
        now = time.monotonic()
        return now - self._first > grace_s or (self.count > 1 and now - self._latest > AT_ONCE_S)


def supervise(launcher: subprocess.Popen[bytes], run_dir: Path, grace_s: float, stop: StopRequest) -> int:
    """Wait for the launcher and what it has started; returns the launcher's exit code, 0 where it has none that tells
    anything: ranks have said in exit.json how the run ended, and what was slow to end after that was killed here.

    The launcher leads a session of its own: a Ctrl-C of the terminal does not reach the ranks past this process.
    Ranks that start after the signal get it as soon as their pid file appears.
    """
    died_at, is_told = None, False
    while launcher.poll() is None:
        if stop.signum is not None:
            if stop.begin_delivery():
                print(f"{signal.Signals(stop.signum).name}: up to {grace_s:g} s for the ranks to stop", flush=True)
            _signal_ranks(run_dir, launcher.pid, stop)
            if stop.is_over(grace_s):
                break
        elif died_at is None and (dead := _vanished(run_dir)):
            died_at, is_told = time.monotonic(), (run_dir / "exit.json").exists()
            if not is_told:
                print(f"rank {', '.join(map(str, dead))} has died", file=sys.stderr, flush=True)
        if died_at is not None and time.monotonic() - died_at > ALONE_S:
            kill_all(launcher)
            return 0 if is_told else launcher.wait()
        time.sleep(POLL_S)
    kill_all(launcher)
    return launcher.wait()


def kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """The launcher, if it still runs, and everything that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def read_rank_pids(run_dir: Path) -> dict[int, int]:
    """Process ids that the ranks have written so far (`pids/rank-*.pid`), by rank."""
    texts = {path.stem: path.read_text().strip() for path in sorted((run_dir / "pids").glob("rank-*.pid"))}
    # A file may be seen before its content.
    return {int(name.removeprefix("rank-")): int(text) for name, text in texts.items() if text.isdigit()}


def _vanished(run_dir: Path) -> list[int]:
    """Ranks that have been there and are gone."""
    return [rank for rank, pid in read_rank_pids(run_dir).items() if not _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _signal_ranks(run_dir: Path, session: int, stop: StopRequest) -> None:
    """Each rank gets a signal once; pid files of other sessions are not ours."""
    assert stop.signum is not None
    for pid in read_rank_pids(run_dir).values():
        try:
            if pid not in stop.reached and os.getsid(pid) == session:
                os.kill(pid, stop.signum)
                stop.reached.add(pid)
        except ProcessLookupError:
            stop.reached.add(pid)
