"""A step that is thrown away leaves no trace, at every ZeRO stage: the next one is what it would have been."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_distributed
from tests.distributed.parity import Layout, make_config, own_batches
from trainer.topology import Topology

pytestmark = pytest.mark.slow

LAYOUTS = {
    f"ZeRO-{stage}, {precision}{', accumulated' if micro_rows == 1 else ''}": Layout(
        2, 1, stage, micro_rows, precision=precision
    )
    for stage in range(4)
    for precision in ("fp32", "bf16")
    for micro_rows in (1, 2)
}


def state_of(engine: Any, topology: Topology) -> dict[str, Tensor]:
    """This rank's weights and moments, and how many updates Adam has made."""
    from trainer.engine_state import MOMENTS, base_optimizer, owned_slices, step_count

    optimizer, state = base_optimizer(engine), {}
    for owned in owned_slices(engine, topology):
        name = f"{owned.fragment.name}|{owned.fragment.offset}"
        state[name] = owned.weight.clone()
        state |= {f"{name}|{kind}": owned.moment(optimizer, kind).clone() for kind in MOMENTS}
        state[f"{name}|count"] = torch.tensor(step_count(optimizer, owned))
    return state


def run(layout: Layout, topology: Topology) -> tuple[bool, bool]:
    """Whether a discarded step left the state as it was, and whether the step after it is that of a run without it."""
    from trainer.discard import discard_step
    from trainer.engine import build_engine, set_process_options
    from trainer.loop import model_inputs, training_step
    from trainer.state import TrainState

    config, ends = make_config(layout, None), []
    steps = [batches for _, batches in zip(range(4), own_batches(config, layout, topology), strict=False)]
    for discards in (False, True):
        set_process_options(config.parallel, config.seed)
        engine, state = build_engine(config, topology), TrainState()
        for batches in steps[:2]:
            training_step(engine, batches, state, config, topology)
        before = state_of(engine, topology)
        if discards:
            for number, batch in enumerate(steps[2], start=1):
                inputs = model_inputs(batch, engine.device)
                poison = float("nan") if topology.rank == 0 else 1.0
                loss = engine(**inputs, text_scale=poison, image_scale=1.0)["loss"]
                engine.backward(loss * 1.0, scale_wrt_gas=False)
                if number < len(steps[2]):
                    engine.step()
            discard_step(engine)
            after = state_of(engine, topology)
            same = all(torch.equal(before[name], after[name]) for name in before)
        training_step(engine, steps[3], state, config, topology)
        ends.append(state_of(engine, topology))
        engine.destroy()
    return same, all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def run_all() -> dict[str, tuple[bool, bool]]:
    import logging

    logging.disable(logging.WARNING)
    from trainer.engine import init_distributed

    topology = init_distributed(make_config(replace(LAYOUTS["ZeRO-0, fp32"]), None).parallel)
    return {name: run(layout, topology) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[bool, bool]]]:
    return run_distributed(run_all, 2, init_group=False, timeout_s=900.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_discarded_step_leaves_no_trace(results: list[dict[str, tuple[bool, bool]]], name: str) -> None:
    for of_rank in results:
        assert of_rank[name] == (True, True)
