"""Ranks killed at any time: the run goes on by itself and ends with the weights of the run that nobody disturbed.

EMU_CHAOS_RUNS says how many runs (`make chaos`: 25).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.weights.fragment_files import read_weights
from tests.chaos.driver import ChaosRun, Ended
from tests.trainer.conftest import corpora, tokenizer_path  # noqa: F401 # fixtures
from tests.trainer.tiny_job import final_state, history
from trainer.monitor import read_metrics

pytestmark = pytest.mark.slow

NUM_RUNS = int(os.environ.get("EMU_CHAOS_RUNS", "5"))
NUM_STEPS = 14
SETTINGS = [
    f"total_steps={NUM_STEPS}",
    "checkpoint.every_steps=3",
    "parallel.zero_stage=3",
    "parallel.persistence_threshold=0",
    "model.causal_transformer.dropout=0.1",
    "data.num_workers=1",
]


def make_run(folder: Path, corpora: Path, tokenizer_path: Path) -> ChaosRun:  # noqa: F811
    return ChaosRun(folder, corpora, tokenizer_path, SETTINGS, fault={"kind": "slow_disk"})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpora: Path, tokenizer_path: Path) -> Ended:  # noqa: F811
    ended = make_run(tmp_path_factory.mktemp("chaos") / "undisturbed", corpora, tokenizer_path).run()
    assert ended.code == 0 and ended.attempts == 1, ended.output
    return ended


@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_a_killed_rank_leaves_no_trace(
    undisturbed: Ended,
    seed: int,
    tmp_path: Path,
    corpora: Path,  # noqa: F811
    tokenizer_path: Path,  # noqa: F811
) -> None:
    """SIGKILL to a random rank after a random time; every third run while a checkpoint is being written."""
    rng = random.Random(seed)
    victim, at_step, delay = rng.randrange(2), rng.randrange(1, NUM_STEPS), rng.random() * 0.3
    while_writing = seed % 3 == 1

    def kill(run: ChaosRun, process: subprocess.Popen[str]) -> None:
        run.wait_until(lambda: run.num_steps() >= at_step, process)
        if while_writing:
            run.wait_until(run.is_writing, process)
        else:
            time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.ranks()[victim], signal.SIGKILL)

    ended = make_run(tmp_path / "run", corpora, tokenizer_path).run(kill)
    assert ended.code == 0, ended.output
    assert ended.attempts == 2 or "has died" not in ended.output, ended.output
    assert final_state(ended.run_dir, NUM_STEPS) == final_state(undisturbed.run_dir, NUM_STEPS)
    assert history(ended.run_dir) == history(undisturbed.run_dir)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return dict(read_weights(run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}"))


def test_other_ranks_after_every_kill(tmp_path: Path, corpora: Path, tokenizer_path: Path) -> None:  # noqa: F811
    """Two data-parallel ranks, two tensor-parallel ones, one alone: the losses and weights of one that was never
    killed, relative difference 1e-5."""
    settings = [setting for setting in SETTINGS if "dropout" not in setting]
    alone = ChaosRun(tmp_path / "alone", corpora, tokenizer_path, settings, num_procs=1).run()
    assert alone.code == 0, alone.output

    def kill_after(num_steps: int) -> Callable[[ChaosRun, subprocess.Popen[str]], None]:
        def kill(run: ChaosRun, process: subprocess.Popen[str]) -> None:
            run.wait_until(lambda: run.num_steps() >= num_steps, process)
            os.kill(run.ranks()[-1], signal.SIGKILL)

        return kill

    once = ["--restarts", "0"]
    for num_procs, layout, num_steps in ((2, [], 4), (2, ["parallel.tensor=2"], 9)):
        run = ChaosRun(tmp_path / "run", corpora, tokenizer_path, [*settings, *layout], flags=once, num_procs=num_procs)
        ended = run.run(kill_after(num_steps))
        assert ended.code not in (0, 2, 75), ended.output
    ended = ChaosRun(tmp_path / "run", corpora, tokenizer_path, settings, num_procs=1).run()
    assert ended.code == 0 and ended.attempts == 3, ended.output
    for ours, expected in zip(read_metrics(ended.run_dir), read_metrics(alone.run_dir), strict=True):
        assert (ours["step"], ours["digest"], ours["text_targets"]) == (
            expected["step"], expected["digest"], expected["text_targets"])  # fmt: skip
        assert ours["loss/text"] == pytest.approx(expected["loss/text"], rel=1e-5)
        assert ours["loss/image"] == pytest.approx(expected["loss/image"], rel=1e-5)
    weights, expected_weights = weights_of(ended.run_dir), weights_of(alone.run_dir)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        difference = float((weight - expected_weights[name]).norm() / expected_weights[name].norm().clamp(min=1e-12))
        assert difference <= 1e-5, f"{name}: {difference:.1e}"
