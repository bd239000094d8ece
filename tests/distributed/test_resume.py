"""An interrupted run and its continuation equal the unbroken run bit for bit: metrics, samples, weights, moments.

Orderly stops run in one start per world size. Signals go to real command lines, which must end with the right code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.harness import run_distributed
from tests.trainer.conftest import corpora, tokenizer_path  # noqa: F401 # fixtures
from tests.trainer.tiny_job import TIMEOUT_S, final_state, finish, history, overrides, start_ranks

pytestmark = pytest.mark.slow

NUM_STEPS, STOP_AFTER, KILL_AFTER = 24, 5, 10
STOPPED_BY_SIGNAL = 75
# The regression begins within the run, so the running variance of its targets has to survive too; and with dropout the
# random state of every rank.
JOB = [
    "model.causal_transformer.dropout=0.1",
    f"total_steps={NUM_STEPS}",
    "checkpoint.every_steps=4",
    "objective=from_scratch",
    "objective.image_weight_delay_steps=3",
    "objective.image_weight_warmup_steps=6",
    "optim.warmup_ratio=0.2",
    "parallel.zero_stage=3",
    "parallel.persistence_threshold=0",
]
WORKERS, WORLD_SIZES = (0, 1), (1, 2)


def train_all(jobs: dict[str, list[str]]) -> dict[str, int]:
    """Exit codes of the jobs, one after another in this group of processes."""
    from trainer import pretrain, run_folder
    from trainer.config import ParallelConfig, compose_config

    topology = pretrain.init_distributed(ParallelConfig(timeout_minutes=1))
    pretrain.init_distributed = lambda _: topology  # a process joins its group once
    codes = {}
    for name, arguments in jobs.items():
        codes[name] = pretrain.train(compose_config(arguments))
        run_folder.release()
    return codes


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    corpora: Path,  # noqa: F811
    tokenizer_path: Path,  # noqa: F811
) -> Iterator[Path]:
    """Run folders `<world size>-<workers>-unbroken` and `...-resumed`, the latter from two orderly halves."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMU_DATA", str(corpora))
        for world_size in WORLD_SIZES:
            jobs = {}
            for workers in WORKERS:
                name = f"{world_size}-{workers}"
                split = [*JOB, f"data.num_workers={workers}"]
                jobs[f"{name}-unbroken"] = overrides(corpora, tokenizer_path, folder / f"{name}-unbroken", *split)
                resumed = overrides(corpora, tokenizer_path, folder / f"{name}-resumed", *split)
                jobs[f"{name} first half"] = [*resumed, f"stop_after_step={STOP_AFTER}"]
                jobs[f"{name} second half"] = resumed
            codes = run_distributed(train_all, world_size, jobs, init_group=False)
            assert codes == [dict.fromkeys(jobs, 0)] * world_size
        yield folder


def assert_equal_runs(run: Path, unbroken: Path) -> None:
    """Every metric but times, and every byte of weights, moments, random states, cursors and counters."""
    assert [record["step"] for record in history(run)] == list(range(1, NUM_STEPS + 1))
    assert history(run) == history(unbroken)
    assert final_state(run, NUM_STEPS) == final_state(unbroken, NUM_STEPS)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_resumed_run_equals_the_unbroken_one(runs: Path, world_size: int, workers: int) -> None:
    name = f"{world_size}-{workers}"
    assert_equal_runs(runs / f"{name}-resumed", runs / f"{name}-unbroken")
    assert (runs / f"{name}-resumed" / "attempt").read_text() == "2\n"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_workers_change_nothing(runs: Path, world_size: int) -> None:
    assert_equal_runs(runs / f"{world_size}-1-unbroken", runs / f"{world_size}-0-unbroken")


def test_ranks_change_no_sample(runs: Path) -> None:
    one, two = (history(runs / f"{world_size}-0-unbroken") for world_size in WORLD_SIZES)
    for name in ("digest", "text_targets", "image_targets", "tokens", "images", "samples", "skips"):
        assert [record[name] for record in one] == [record[name] for record in two], name
    assert len({record["digest"] for record in one}) == NUM_STEPS


def wait_for_step(run_dir: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        with contextlib.suppress(FileNotFoundError):
            if f'"step": {step},' in (run_dir / "metrics.jsonl").read_text():
                return
        time.sleep(0.01)
    raise AssertionError("\n".join(process.communicate()[0] for process in processes if process.poll() is not None))


def workers_of(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Command lines of what outlived the ranks, which lead sessions of their own."""
    sessions = {process.pid for process in processes}
    left = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) in sessions:
                left.append((entry / "cmdline").read_text())
    return [command for command in left if command]  # the dead have none


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(
    runs: Path,
    corpora: Path,  # noqa: F811
    tokenizer_path: Path,  # noqa: F811
    world_size: int,
) -> None:
    run_dir = runs / f"{world_size}-terminated"
    arguments = overrides(corpora, tokenizer_path, run_dir, *JOB, "data.num_workers=1")
    processes = start_ranks(world_size, arguments, corpora)
    wait_for_step(run_dir, KILL_AFTER, processes)
    processes[-1].send_signal(signal.SIGTERM)  # one rank is asked, all stop
    ended = finish(processes)
    assert [code for code, _ in ended] == [STOPPED_BY_SIGNAL] * world_size, ended
    assert workers_of(processes) == []
    stopped = json.loads((run_dir / "exit.json").read_text())
    step = int((run_dir / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert KILL_AFTER <= step < NUM_STEPS
    assert stopped == {"code": STOPPED_BY_SIGNAL, "reason": f"stopped by a signal after step {step}"}
    assert "Traceback" not in "".join(output for _, output in ended)

    ended = finish(start_ranks(world_size, arguments, corpora))
    assert [code for code, _ in ended] == [0] * world_size, ended
    assert_equal_runs(run_dir, runs / f"{world_size}-1-unbroken")
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    runs: Path,
    corpora: Path,  # noqa: F811
    tokenizer_path: Path,  # noqa: F811
) -> None:
    run_dir = runs / "1-killed"
    arguments = overrides(corpora, tokenizer_path, run_dir, *JOB, "data.num_workers=1")
    processes = start_ranks(1, arguments, corpora)
    wait_for_step(run_dir, KILL_AFTER, processes)
    processes[0].kill()
    assert finish(processes)[0][0] == -signal.SIGKILL
    assert not (run_dir / "exit.json").exists()
    time.sleep(0.5)  # the kernel ends the workers with their rank
    assert workers_of(processes) == []

    ended = finish(start_ranks(1, arguments, corpora))
    assert [code for code, _ in ended] == [0], ended
    assert_equal_runs(run_dir, runs / "1-1-unbroken")
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) > NUM_STEPS  # the steps after the checkpoint were done twice
