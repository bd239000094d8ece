"""Which steps are no good, who holds a run up, and how an error ends it."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conf import UserError
from trainer.config import GuardConfig
from trainer.endings import as_user_error, lost_connection
from trainer.guards import LossHistory, Problem, judge
from trainer.phases import Phases
from trainer.profiling import Profiler
from trainer.topology import Topology
from trainer.watchdog import blame, describe

GUARD = GuardConfig(spike_deviations=6.0, spike_share=0.1, history_steps=20)


def settled(noise: float = 0.1, mean: float = 3.0) -> LossHistory:
    rng, history = random.Random(0), LossHistory()
    for _ in range(200):
        history.update(rng.gauss(mean, noise), GUARD)
    return history


def test_history_is_the_mean_and_deviation_of_the_latest_losses() -> None:
    history = settled()
    assert history.mean == pytest.approx(3.0, abs=0.1) and math.sqrt(history.variance) == pytest.approx(0.1, rel=0.5)
    for _ in range(200):
        history.update(1.0, GUARD)
    assert history.mean == pytest.approx(1.0, abs=1e-3) and history.variance < 1e-3


@pytest.mark.parametrize(("loss", "expected"), [(3.0, False), (3.25, False), (4.5, True), (1.0, False)])
def test_a_spike_is_far_above_the_mean(loss: float, expected: bool) -> None:
    assert settled().is_spike(loss, GUARD) is expected


def test_a_loss_without_noise_still_has_room() -> None:
    """Six deviations of nothing are nothing: a tenth of the mean is allowed anyway."""
    assert not settled(noise=0.0).is_spike(3.29, GUARD)
    assert settled(noise=0.0).is_spike(3.31, GUARD)


def test_no_spike_without_a_history_or_when_it_is_off() -> None:
    history = LossHistory()
    for _ in range(GUARD.history_steps - 1):
        history.update(3.0, GUARD)
        assert not history.is_spike(100.0, GUARD)
    assert not settled().is_spike(100.0, GuardConfig(spike_deviations=0.0))


def test_judgement() -> None:
    assert judge([], 3.0, settled(), GUARD) is None
    assert judge([], None, settled(), GUARD) is None
    assert judge([2, 5], 3.0, settled(), GUARD) == Problem("loss is not a number", (2, 5))
    spike = judge([], 30.0, settled(), GUARD)
    assert spike is not None and spike.reason.startswith("text loss jumped from ") and spike.ranks == ()


def report(step: int = 5, phase: str = "forward", waits: bool = True) -> dict[str, Any]:
    file = "/x/torch/distributed/distributed_c10d.py:12 all_reduce" if waits else "/x/reader.py:7 read"
    return {"step": step, "phase": phase, "seconds": 9.6, "keys": [], "stacks": {"MainThread": [file]}}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ({0: report()}, "rank 1 did not answer at all"),
        ({0: report(), 1: report(phase="data_wait", waits=False)}, "rank 1 stood in data_wait of step 5 for 10 s"),
        ({0: report(step=4, phase="agree"), 1: report()}, "rank 0 stood in agree of step 4"),
        ({0: report(), 1: report(waits=False)}, "rank 1 stood in forward"),
        ({0: report(), 1: report()}, "ranks 0, 1 stood in forward"),
    ],
)
def test_who_holds_the_others_up(reports: dict[int, dict[str, Any]], expected: str) -> None:
    assert blame(reports, 2, 60.0).startswith(f"no step within 60 s: {expected}")


def test_a_rank_says_where_it_is() -> None:
    phases = Phases()
    phases.step = 7
    with phases("forward"):
        found = describe(phases)
    json.dumps(found)
    assert (found["step"], found["phase"]) == (7, "forward") and found["seconds"] < 5
    assert any(line.endswith("test_a_rank_says_where_it_is") for line in found["stacks"]["MainThread"])


def test_phases_add_up_until_they_are_taken() -> None:
    phases = Phases()
    for name in ("forward", "data_wait", "forward"):
        with phases(name):
            time.sleep(0.02)
    seconds = phases.take(may_wait=True)
    assert seconds["forward"] >= 0.04 > seconds["data_wait"] >= 0.02
    assert phases.take(may_wait=True) == {} and phases.name == "between phases"


def real_memory_error() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    return caught.value


def test_endings() -> None:
    rank = Topology(rank=3, world_size=4)
    memory = as_user_error(real_memory_error(), rank)
    assert memory is not None and memory.code == 2 and str(memory).startswith("rank 3 ran out of memory (")
    worker = as_user_error(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), rank)
    assert worker is not None and worker.code == 76 and "a loader worker of rank 3 died" in str(worker)
    gone = RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29")
    lost = as_user_error(gone, rank)
    assert lost is not None and lost.code == 76 and lost_connection(gone)
    told = UserError("mend this")
    assert as_user_error(told, rank) is told
    assert as_user_error(RuntimeError("shapes differ"), rank) is None
    assert as_user_error(ValueError("Connection closed by peer"), rank) is None


def test_a_profile_of_the_step_that_was_asked_for(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, rank=0, step=2)
    for step in (1, 2, 3):
        with profiler.around(step):
            torch.ones(64, 64) @ torch.ones(64, 64)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "step-00000002-rank-00000.json.gz",
        "step-00000002-rank-00000.txt",
    ]
    assert "aten::mm" in (tmp_path / "profile" / "step-00000002-rank-00000.txt").read_text()


def test_only_the_first_rank_profiles_by_number(tmp_path: Path) -> None:
    with Profiler(tmp_path, rank=1, step=2).around(2):
        pass
    assert not (tmp_path / "profile").exists()
