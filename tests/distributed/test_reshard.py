"""Training that moves from one layout to another through a checkpoint goes on as if it had stayed.

Every layout trains five steps and saves; every layout loads what every other one saved and trains five more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.parity import (
    NUM_STEPS,
    START_VARIANCE,
    Layout,
    Run,
    gathered,
    make_config,
    own_batches,
    run_layouts,
)
from trainer.topology import Topology

pytestmark = pytest.mark.slow

MOVE_AT = NUM_STEPS // 2
LAYOUTS = {
    "(2,1,z3)": Layout(2, 1, 3, 1, "from scratch"),
    "(1,2,z3)": Layout(1, 2, 3, 2, "from scratch"),
    "(2,2,z1)": Layout(2, 2, 1, 1, "from scratch"),
    "(4,1,z3)": Layout(4, 1, 3, 1, "from scratch"),
    "(1,1,z0)": Layout(1, 1, 0, 2, "from scratch"),
}
MOVES = [(old, new) for old in LAYOUTS for new in LAYOUTS if old != new]
# Each layout is left once and entered once; both ways between the kinds of parallelism, and up and down in ZeRO.
COVER = [
    ("(2,1,z3)", "(1,2,z3)"),
    ("(1,2,z3)", "(4,1,z3)"),
    ("(4,1,z3)", "(2,2,z1)"),
    ("(2,2,z1)", "(1,1,z0)"),
    ("(1,1,z0)", "(2,1,z3)"),
]
CASES = [pytest.param(*move, marks=() if move in COVER else pytest.mark.matrix) for move in MOVES]


def train(layout: Layout, topology: Topology, folder: Path, come_from: str | None) -> Run:
    """The first half of the steps, saved under the layout's name; or the second half, from what `come_from` saved."""
    from trainer.checkpoint import load_checkpoint
    from trainer.checkpoint_writer import save_checkpoint
    from trainer.diagnostics import TargetVariance, loss_metrics
    from trainer.engine import build_engine, set_process_options
    from trainer.loop import training_step
    from trainer.state import TrainState

    config, run = make_config(layout, None), Run()
    # Other weights than those that were saved: what is not loaded would be seen.
    set_process_options(config.parallel, config.seed + (come_from is not None))
    engine, state = build_engine(config, topology), TrainState(variance=TargetVariance(START_VARIANCE))
    if come_from is not None:
        path = folder / come_from / "checkpoints" / f"step-{MOVE_AT:08d}"
        saved = load_checkpoint(path, engine, topology)
        state.step, state.variance.value = saved.step, saved.state["variance"]
    for step, batches in enumerate(own_batches(config, layout, topology)):
        if (step < MOVE_AT) == (come_from is None):
            result = training_step(engine, batches, state, config, topology)
            losses = loss_metrics(result.sums, list(config.data.sources))
            run.losses.append((losses["loss/text"], losses["loss/image"]))
            run.norms.append(result.grad_norm)
    if come_from is None:
        name = next(name for name, value in LAYOUTS.items() if value == layout)
        save_checkpoint(folder / name, engine, topology, state.step, {"variance": state.variance.value}, {})
    run.weights = gathered(engine, topology)
    engine.destroy()
    return run


def run_moves(moves: list[tuple[str | None, str]], folder: Path) -> dict[tuple[str | None, str], Run]:
    import logging

    logging.disable(logging.WARNING)
    from megatron.core import parallel_state

    from trainer.engine import init_distributed

    runs = {}
    for old, new in moves:
        layout = LAYOUTS[new]
        parallel_state.destroy_model_parallel()
        topology = init_distributed(make_config(layout, None).parallel)
        runs[old, new] = train(layout, topology, folder, old)
    return runs


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Run]]:
    """Of every move whose test is to run, and of the first half in every layout, the runs by rank."""
    folder = tmp_path_factory.mktemp("reshard")
    here = [item.callspec.params for item in request.session.items if item.path == request.path]
    moves = [(params["old"], params["new"]) for params in here]
    results: dict[Any, list[Run]] = {}
    for half in ([(None, name) for name in LAYOUTS], moves):
        for world_size in (1, 2, 4):
            fitting = [move for move in half if LAYOUTS[move[1]].dp * LAYOUTS[move[1]].tp == world_size]
            if fitting:
                arguments = (run_moves, world_size, fitting, folder)
                by_rank = run_distributed(*arguments, init_group=False, timeout_s=1200.0)
                results |= {move: [of_rank[move] for of_rank in by_rank] for move in fitting}
    return results


@pytest.fixture(scope="module")
def unbroken() -> Run:
    """All steps in one process without DeepSpeed."""
    return run_distributed(run_layouts, 1, {}, None, init_group=False)[0]["from scratch"]


def relative_distance(weights: dict[str, Tensor], expected: Run) -> float:
    """The largest |w_a - w_b| / |w_a - w_0| of a parameter."""
    return max(
        float(torch.norm(weights[name] - weight) / torch.norm(weight - expected.start[name]))
        for name, weight in expected.weights.items()
    )


@pytest.mark.parametrize(("old", "new"), CASES)
def test_a_moved_run_goes_on_as_the_unbroken_one(runs: dict[Any, list[Run]], unbroken: Run, old: str, new: str) -> None:
    """Losses within 1e-5 and gradient norms within a relative 1e-5; weights within 1e-3 of the distance moved."""
    for first in runs[None, old]:
        torch.testing.assert_close(
            torch.tensor(first.losses), torch.tensor(unbroken.losses[:MOVE_AT]), atol=1e-5, rtol=0
        )
    for run in runs[old, new]:
        torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(unbroken.losses[MOVE_AT:]), atol=1e-5, rtol=0)
        assert run.norms == pytest.approx(unbroken.norms[MOVE_AT:], rel=1e-5)
        assert relative_distance(run.weights, unbroken) <= 1e-3
