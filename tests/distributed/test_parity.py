"""One process without DeepSpeed against data- and tensor-parallel ones at every ZeRO stage: the same gradients, losses,
weights.

Rows are laid by hand: the ranks differ in text and image targets, and in some steps one of them, or each, has no image.
A start with deepspeed costs seconds, so one start per world size runs all of its layouts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Batch, SampleKey
from models.config import ObjectiveConfig
from models.emu import Emu
from tests.distributed.harness import run_distributed
from tests.models.tiny_emu import BOS, EOS, IMG, NUM_QUERIES, NUM_SOURCES, PAD, PICTURE, Doc, lay_out, tiny_config
from trainer.config import OptimConfig, ParallelConfig, PretrainConfig
from trainer.topology import Topology

pytestmark = pytest.mark.slow

NUM_STEPS, NUM_ROWS, ROW_LENGTH = 10, 4, 42
START_VARIANCE = 0.5
"""As if a step had been done: else the first gradient of a variance-normalised objective has no regression in it."""
GRADIENT_TOLERANCE, LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-5, 1e-3
HANG_MINUTES = 0.5

OBJECTIVES = {
    "paper": ObjectiveConfig(),
    "from scratch": ObjectiveConfig(target_normalisation="variance", regression_gradient="text_only"),
}


@dataclass(frozen=True)
class Layout:
    dp: int
    stage: int
    micro_rows: int = NUM_ROWS
    objective: str = "paper"
    persistence_threshold: int = 0
    tp: int = 1


@dataclass
class Run:
    """losses: text, image by step. norms: of the gradient before clipping. gradients: of step 1. start, weights: of the
    model before and after."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


LAYOUTS = {
    **{f"1 process, ZeRO-{stage}": Layout(1, stage) for stage in range(4)},
    **{f"1 process, ZeRO-{stage}, 4 micro-batches": Layout(1, stage, micro_rows=1) for stage in (0, 3)},
    **{f"1 process, ZeRO-{stage}, from scratch": Layout(1, stage, 2, "from scratch") for stage in (0, 3)},
    **{f"2 processes, ZeRO-{stage}": Layout(2, stage, micro_rows=2) for stage in range(4)},
    **{f"2 processes, ZeRO-{stage}, 2 micro-batches": Layout(2, stage, micro_rows=1) for stage in range(4)},
    **{f"2 processes, ZeRO-{stage}, from scratch": Layout(2, stage, 2, "from scratch") for stage in (0, 3)},
    "2 processes, ZeRO-3, from scratch, 2 micro-batches": Layout(2, 3, 1, "from scratch"),
    "2 processes, ZeRO-3, small weights kept": Layout(2, 3, 2, persistence_threshold=100_000),
    **{f"tp 2, ZeRO-{stage}": Layout(1, stage, 2, tp=2) for stage in range(4)},
    "tp 2, ZeRO-3, from scratch": Layout(1, 3, 2, "from scratch", tp=2),
    **{f"dp 2, tp 2, ZeRO-{stage}": Layout(2, stage, 1, tp=2) for stage in (0, 1, 3)},
    "dp 2, tp 2, ZeRO-2, from scratch": Layout(2, 2, 2, "from scratch", tp=2),
}
STARTS = sorted({(layout.dp, layout.tp) for layout in LAYOUTS.values()})


def rows_of_step(step: int) -> list[list[Doc]]:
    """Four packed rows, the first two of rank 0 and the others of rank 1, where there are two ranks."""
    rng = random.Random(step)

    def words(number: int) -> list[int]:
        return [rng.randrange(3, PAD) for _ in range(number)]

    captioned = Doc([BOS, *PICTURE, *words(6), EOS], source=0)
    page = Doc([BOS, *words(3), *PICTURE, *words(2), *PICTURE, *words(4), EOS], source=1)
    film = Doc([BOS, *PICTURE, *PICTURE, *PICTURE, *words(3), EOS], source=2)
    broken = Doc([BOS, *words(4), *PICTURE, EOS], source=0, ok=False)
    text = Doc([BOS, *words(11), EOS], source=1)
    return [
        [[page, captioned], [film, captioned], [text], [text, text, text]],  # rank 1 has no image
        [[text, text], [text], [film, page], [broken, captioned]],  # rank 0 has none
        [[page], [broken], [captioned, captioned], [film, text]],
        [[text], [text, text], [text], [text]],  # neither has one
    ][step % 4]


def global_batch(step: int) -> dict[str, Tensor]:
    inputs = lay_out(rows_of_step(step), ROW_LENGTH)
    pixels = torch.Generator().manual_seed(step)
    inputs["images"] = torch.randint(256, inputs["images"].shape, dtype=torch.uint8, generator=pixels)
    return inputs


def num_targets(step: int) -> tuple[int, int]:
    """Of text and image losses, counted document by document."""
    documents = [document for row in rows_of_step(step) for document in row if document.ok]
    text = sum(token < PAD for document in documents for token in document.ids[1:])
    return text, sum(document.ids.count(IMG) * (NUM_QUERIES + 1) for document in documents)


def batch_of_rows(inputs: dict[str, Tensor], first: int, last: int) -> Batch:
    """Rows [first, last) of the global batch as the loader would give them."""
    starts = inputs["image_starts"]
    mine = (starts[:, 0] >= first) & (starts[:, 0] < last)
    rows = {name: value[first:last] for name, value in inputs.items() if name not in ("images", "image_starts")}
    pictures = {"images": inputs["images"][mine], "image_starts": starts[mine] - torch.tensor([first, 0])}
    keys = [[SampleKey("hand", 0, row)] for row in range(first, last)]
    return Batch(**rows, **pictures, keys=keys, cursors={}, skips={})


def make_config(layout: Layout) -> PretrainConfig:
    sources = {f"source {number}": SourceConfig(kind="pairs", shards="") for number in range(NUM_SOURCES)}
    data = DataConfig(
        sources=sources, tokenizer="", global_batch_rows=NUM_ROWS, micro_batch_rows=layout.micro_rows, lanes=NUM_ROWS
    )
    parallel = ParallelConfig(
        zero_stage=layout.stage,
        tensor=layout.tp,
        persistence_threshold=layout.persistence_threshold,
        timeout_minutes=HANG_MINUTES,
        threads=1,
        deterministic=True,
    )
    return PretrainConfig(
        run_dir="",
        total_steps=NUM_STEPS,
        model=tiny_config(),
        data=data,
        objective=OBJECTIVES[layout.objective],
        optim=OptimConfig(1e-3, 1e-3, 1e-3, schedule="constant"),
        parallel=parallel,
    )


def run_plain(objective: str) -> Run:
    """The reference: one forward pass over all rows, autograd, torch's AdamW. No engine, no accumulation."""
    from trainer.engine import parameter_groups

    config = make_config(Layout(1, 0, objective=objective))
    torch.manual_seed(config.seed)
    model = Emu(config.model, config.objective, NUM_SOURCES)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim), betas=(0.9, 0.98), eps=1e-6)
    variance, run = START_VARIANCE, Run(start=copy_of(model))
    for step in range(NUM_STEPS):
        inputs, (text, image) = global_batch(step), num_targets(step)
        unit = variance if config.objective.target_normalisation == "variance" else 1.0
        z = model.encode(inputs["images"]).detach() if len(inputs["images"]) else None
        outputs = model(**inputs, text_scale=1 / max(1, text), image_scale=1 / unit / max(1, image))
        optimizer.zero_grad()
        outputs["loss"].backward()
        if step == 0:
            run.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        run.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)))
        optimizer.step()
        sums = outputs["text_loss"].sum(), outputs["image_loss"].sum()
        run.losses.append((float(sums[0]) / max(1, text), float(sums[1]) / max(1, image)))
        if z is not None:
            variance = 0.9 * variance + 0.1 * float(z.var(dim=0, unbiased=False).mean())
    run.weights = copy_of(model)
    return run


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def record_first_gradients(engine: Any, into: dict[str, Tensor]) -> None:
    """What the optimizer is about to use, reduced over ranks and micro-batches but not yet clipped."""
    from deepspeed.utils import safe_get_full_grad

    step = engine.step

    def recording_step() -> None:
        if engine.is_gradient_accumulation_boundary() and not into:
            into.update({name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()})
        step()

    engine.step = recording_step


def whole(values: dict[str, Tensor], model: nn.Module, topology: Topology) -> dict[str, Tensor]:
    """With the shards of all tensor-parallel ranks put together; what is whole on each of them must be the same."""
    if topology.tp_size == 1:
        return values
    parameters, results = dict(model.named_parameters()), {}
    for name, value in values.items():
        parts = [torch.empty_like(value) for _ in range(topology.tp_size)]
        dist.all_gather(parts, value.contiguous(), group=topology.tp_group)
        if getattr(parameters[name], "tensor_model_parallel", False):
            assert not torch.equal(parts[0], parts[1]), f"{name}: the ranks hold the same shard"
            results[name] = torch.cat(parts, dim=parameters[name].partition_dim)
        else:
            assert all(torch.equal(part, value) for part in parts), name
            results[name] = value
    return results


def run_layout(layout: Layout, topology: Topology) -> Run:
    import deepspeed

    from trainer.diagnostics import TargetVariance, loss_metrics
    from trainer.engine import build_engine, set_process_options
    from trainer.loop import training_step
    from trainer.state import TrainState

    config, run = make_config(layout), Run()
    set_process_options(config.parallel, config.seed)
    engine = build_engine(config, topology)
    record_first_gradients(engine, run.gradients)
    state = TrainState(variance=TargetVariance(START_VARIANCE))
    own_rows = NUM_ROWS // layout.dp
    begin = topology.dp_rank * own_rows
    for step in range(NUM_STEPS):
        inputs = global_batch(step)
        firsts = range(begin, begin + own_rows, layout.micro_rows)
        batches = [batch_of_rows(inputs, first, first + layout.micro_rows) for first in firsts]
        result = training_step(engine, batches, state, config, topology)
        assert (result.counts.text_targets, result.counts.image_targets) == num_targets(step)
        losses = loss_metrics(result.sums, list(config.data.sources))
        run.losses.append((losses["loss/text"], losses["loss/image"]))
        run.norms.append(result.grad_norm)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=layout.stage == 3):
        run.weights = whole(copy_of(engine.module), engine.module, topology)
    run.gradients = whole(run.gradients, engine.module, topology)
    engine.destroy()
    return run


def run_layouts(dp: int, tp: int) -> dict[str, Run]:
    import logging

    logging.disable(logging.WARNING)
    from trainer.engine import init_distributed

    topology = init_distributed(ParallelConfig(timeout_minutes=HANG_MINUTES, tensor=tp))
    assert (topology.dp_size, topology.tp_size) == (dp, tp)
    plain = {objective: run_plain(objective) for objective in OBJECTIVES if (dp, tp) == (1, 1)}
    runs = {
        name: run_layout(layout, topology) for name, layout in LAYOUTS.items() if (layout.dp, layout.tp) == (dp, tp)
    }
    return plain | runs


@pytest.fixture(scope="module")
def results() -> dict[str, list[Run]]:
    """Of every layout, the runs by rank, and under the name of an objective its plain run."""
    starts = [run_distributed(run_layouts, dp * tp, dp, tp, init_group=False) for dp, tp in STARTS]
    return {name: [of_rank[name] for of_rank in by_rank] for by_rank in starts for name in by_rank[0]}


def test_the_steps_have_what_they_are_for() -> None:
    """Unequal target counts on the ranks, a rank without images, and steps with none at all."""
    images = [[sum(d.ids.count(IMG) for d in row) for row in rows_of_step(step)] for step in range(4)]
    assert [(sum(counts[:2]), sum(counts[2:])) for counts in images] == [(7, 0), (0, 7), (3, 5), (0, 0)]
    assert all(num_targets(step)[0] > 0 for step in range(4)) and num_targets(3)[1] == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients(results: dict[str, list[Run]], name: str) -> None:
    expected = results[LAYOUTS[name].objective][0].gradients
    for run in results[name]:
        assert run.gradients.keys() == expected.keys()
        for parameter, gradient in expected.items():
            difference = torch.norm(run.gradients[parameter] - gradient)
            assert difference <= GRADIENT_TOLERANCE * torch.norm(gradient), parameter


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradient_norms(results: dict[str, list[Run]], name: str) -> None:
    expected = results[LAYOUTS[name].objective][0]
    for run in results[name]:
        torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(expected.losses), atol=LOSS_TOLERANCE, rtol=0)
        assert run.norms == pytest.approx(expected.norms, rel=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights(results: dict[str, list[Run]], name: str) -> None:
    expected = results[LAYOUTS[name].objective][0]
    for run in results[name]:
        for parameter, weight in expected.weights.items():
            moved = torch.norm(weight - expected.start[parameter])
            assert moved > 0, parameter
            assert torch.norm(run.weights[parameter] - weight) <= WEIGHT_TOLERANCE * moved, parameter
