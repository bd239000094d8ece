"""What can go wrong within a run, each through the launcher: it ends as documented, with the right rank named."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.driver import ChaosRun, Ended
from tests.trainer.conftest import corpora, tokenizer_path  # noqa: F401 # fixtures

pytestmark = pytest.mark.slow

SETTINGS = [
    "total_steps=10",
    "checkpoint.every_steps=2",
    "parallel.zero_stage=3",
    "data.num_workers=1",
    "guard.history_steps=3",
    "guard.patience=2",
]


@pytest.fixture
def start(tmp_path: Path, corpora: Path, tokenizer_path: Path) -> Any:  # noqa: F811
    def make(kind: str, *more: str, rank: int | str = 1, step: int = 5, flags: tuple[str, ...] = ()) -> ChaosRun:
        fault = {"kind": kind, "rank": rank, "step": step, "attempt": 1}
        return ChaosRun(tmp_path / "run", corpora, tokenizer_path, [*SETTINGS, *more], fault, list(flags))

    return make


def test_a_loss_that_is_not_a_number_on_one_rank(start: Any) -> None:
    """The step is thrown away, the rank and its samples are named, and training goes on."""
    ended: Ended = start("nan").run()
    assert ended.code == 0 and ended.attempts == 1, ended.output
    event = ended.event("step_discarded")
    assert (event["step"], event["ranks"], event["reason"]) == (5, [1], "loss is not a number")
    assert event["keys"] and all(source in ("laion", "mmc4") for source, _, _ in event["keys"])


@pytest.mark.parametrize("kind", ["freeze", "stopped"])
def test_a_rank_that_stands_still(start: Any, kind: str) -> None:
    """Every rank that can says where it is, the one that holds the others up is named, and the run starts again."""
    ended: Ended = start(kind, "guard.hang_minutes=0.2").run()
    assert ended.code == 0 and ended.attempts == 2, ended.output
    assert "died with code 76 (no step within 12 s: rank 1 " in ended.output
    if kind == "freeze":
        assert "rank 1 stood in data_wait of step 5" in ended.output


def test_a_dead_loader_worker(start: Any) -> None:
    ended: Ended = start("dead_worker").run()
    assert ended.code == 0 and ended.attempts == 2, ended.output
    assert "died with code 76 (a loader worker of rank 1 died (DataLoader worker" in ended.output


def test_a_rank_out_of_memory(start: Any) -> None:
    """The same would happen again: no restart."""
    ended: Ended = start("out_of_memory").run()
    assert ended.code == 2 and ended.attempts == 1, ended.output
    assert ended.exit["reason"].startswith("rank 1 ran out of memory (")
    assert "lower data.micro_batch_rows" in ended.exit["reason"]


def test_one_signal_leaves_a_checkpoint_of_its_step(start: Any) -> None:
    """Within one step, with the documented code, loader workers running."""
    seen = []

    def terminate(run: ChaosRun, process: subprocess.Popen[str]) -> None:
        run.wait_until(lambda: run.num_steps() >= 3, process)
        seen.append(run.num_steps())
        process.send_signal(signal.SIGTERM)

    ended: Ended = start("none", "total_steps=500").run(terminate)
    assert ended.code == 75, ended.output
    step = int((ended.run_dir / "checkpoints" / "latest").read_text()[5:])
    assert ended.exit == {"code": 75, "reason": f"stopped by a signal after step {step}"}
    assert seen[0] <= step <= seen[0] + 3  # the signal takes the launcher's poll of 0.1 s to the ranks


def test_two_signals_end_it_at_once(start: Any) -> None:
    def terminate_twice(run: ChaosRun, process: subprocess.Popen[str]) -> None:
        run.wait_until(lambda: run.num_steps() >= 3, process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)

    ended: Ended = start("freeze", step=4).run(terminate_twice)
    assert ended.code == 128 + signal.SIGTERM, ended.output


def test_no_rank_outlives_the_bare_launcher(tmp_path: Path, corpora: Path, tokenizer_path: Path) -> None:  # noqa: F811
    """TERM ends only the `deepspeed` command; its ranks notice, save, and end."""
    run = ChaosRun(tmp_path / "run", corpora, tokenizer_path, [*SETTINGS, "total_steps=5000"])

    def terminate(run: ChaosRun, process: subprocess.Popen[str]) -> None:
        run.wait_until(lambda: run.num_steps() >= 3, process)
        process.send_signal(signal.SIGTERM)

    ended = run.run(terminate, bare=True, patience_s=60.0)
    assert ended.exit["code"] == 75 and (ended.run_dir / "checkpoints" / "latest").exists(), ended.output


def test_a_time_limit_is_like_a_signal(start: Any) -> None:
    ended: Ended = start("none", "total_steps=5000", "stop_after_minutes=0.1").run()
    assert ended.code == 75, ended.output
    assert ended.exit["reason"].startswith("stopped by its time limit after step ")
