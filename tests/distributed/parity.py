"""Train a layout on the same rows as one process without DeepSpeed; what both bring back can be compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Batch, SampleKey
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.tokenizer import Tokenizer
from models.config import ObjectiveConfig
from models.emu import Emu
from tests.models.tiny_emu import BOS, EOS, IMG, NUM_SOURCES, PAD, PICTURE, Doc, lay_out, tiny_config
from trainer.config import OptimConfig, ParallelConfig, PretrainConfig
from trainer.topology import Topology

NUM_STEPS, NUM_ROWS, ROW_LENGTH = 10, 4, 42
START_VARIANCE = 0.5
"""As if a step had been done: else the first gradient of a variance-normalised objective has no regression in it."""
HANG_MINUTES = 1.0

OBJECTIVES = {
    "paper": ObjectiveConfig(),
    "from scratch": ObjectiveConfig(target_normalisation="variance", regression_gradient="text_only"),
}


@dataclass(frozen=True)
class Layout:
    """real: rows of real shards, not those laid by hand."""

    dp: int
    tp: int
    stage: int
    micro_rows: int = 1
    objective: str = "paper"
    persistence_threshold: int = 0
    recompute: str = "none"
    offload: tuple[str, str] = ("none", "none")
    real: bool = False
    precision: str = "fp32"
    sequence: bool = False


@dataclass
class Run:
    """losses: text, image by step. norms: of the gradient before clipping. gradients: of step 1. start, weights: of the
    model before and after. counts: of text and image targets by step. samples, skips: how many over all ranks, by
    source and by "source: reason"."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


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


def batch_by_hand(step: int, first: int, last: int, tp_rank: int = 0, tp_size: int = 1) -> Batch:
    """Rows [first, last) of a step as the loader would give them, but every tp_size-th image is of this rank; only the
    one that holds a broken picture knows of it."""
    inputs = lay_out(rows_of_step(step), ROW_LENGTH)
    pixels = torch.Generator().manual_seed(step)
    inputs["images"] = torch.randint(256, inputs["images"].shape, dtype=torch.uint8, generator=pixels)
    starts = inputs["image_starts"]
    here = (starts[:, 0] >= first) & (starts[:, 0] < last)
    images, starts = inputs["images"][here], starts[here] - torch.tensor([first, 0])
    shares = [range(rank, len(images), tp_size) for rank in range(tp_size)]
    rows = {name: value[first:last] for name, value in inputs.items() if not name.startswith("image")}
    failures = {}
    for row, document in (~rows["document_ok"] & (rows["document_sources"] >= 0)).nonzero().tolist():
        picture = [(r, int(rows["document_ids"][r, column]) - 1) for r, column in starts.tolist()].index(
            (row, document)
        )
        if picture in shares[tp_rank]:
            failures[row, document] = "broken"
        else:
            rows["document_ok"][row, document] = True
    return Batch(
        **rows,
        images=images[list(shares[tp_rank])],
        image_starts=starts[[place for share in shares for place in share]],
        image_counts=list(map(len, shares)),
        keys=[[SampleKey(f"source {d.source}", 0, row) for d in rows_of_step(step)[row]] for row in range(first, last)],
        cursors={},
        failures=failures,
        skips={("source 0", "left out"): last - first},
    )


def own_batches(config: PretrainConfig, layout: Layout, topology: Topology) -> Iterator[list[Batch]]:
    """The micro-batches of a rank, step by step."""
    own_rows = NUM_ROWS // layout.dp
    if not layout.real:
        begin = topology.dp_rank * own_rows
        firsts = range(begin, begin + own_rows, layout.micro_rows)
        for step in range(NUM_STEPS):
            yield [
                batch_by_hand(step, first, first + layout.micro_rows, topology.tp_rank, topology.tp_size)
                for first in firsts
            ]
        return
    loader = iter(
        Loader(
            config.data,
            open_indexes(config.data, build_missing=False),
            Tokenizer(config.data.tokenizer),
            num_queries=config.model.causal_transformer.num_queries,
            image_size=config.model.vision.image_size,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            tp_rank=topology.tp_rank,
            tp_size=topology.tp_size,
        )
    )
    for _ in range(NUM_STEPS):
        yield [next(loader) for _ in range(own_rows // layout.micro_rows)]


def count_targets(batch: Batch, config: PretrainConfig) -> tuple[int, int]:
    """Of text and image losses, position by position."""
    text_vocab = config.model.language_model.text_vocab_size
    text = image = 0
    for ids, documents, ok in zip(
        batch.input_ids.tolist(), batch.document_ids.tolist(), batch.document_ok.tolist(), strict=True
    ):
        for place in range(1, len(ids)):
            if documents[place] and documents[place] == documents[place - 1] and ok[documents[place] - 1]:
                text += ids[place] < text_vocab
                image += (config.model.causal_transformer.num_queries + 1) * (ids[place] == text_vocab + IMG - PAD)
    return text, image


def make_config(layout: Layout, real: PretrainConfig | None) -> PretrainConfig:
    """The job of a layout; real: the one whose model and data real rows are made for."""
    parallel = ParallelConfig(
        zero_stage=layout.stage,
        precision=layout.precision,
        tensor=layout.tp,
        sequence=layout.sequence,
        activation_checkpointing=layout.recompute,
        offload_optimizer=layout.offload[0],
        offload_parameters=layout.offload[1],
        persistence_threshold=layout.persistence_threshold,
        timeout_minutes=HANG_MINUTES,
        threads=1,
        deterministic=True,
    )
    changes: dict[str, Any] = {
        "objective": OBJECTIVES[layout.objective],
        "optim": OptimConfig(1e-3, 1e-3, 1e-3, schedule="constant"),
        "parallel": parallel,
        "total_steps": NUM_STEPS,
    }
    if layout.real:
        assert real is not None
        return replace(real, data=replace(real.data, micro_batch_rows=layout.micro_rows), **changes)
    sources = {f"source {number}": SourceConfig(kind="pairs", shards="") for number in range(NUM_SOURCES)}
    data = DataConfig(
        sources=sources, tokenizer="", global_batch_rows=NUM_ROWS, micro_batch_rows=layout.micro_rows, lanes=NUM_ROWS
    )
    return PretrainConfig(run_dir="", model=tiny_config(), data=data, **changes)


def run_plain(objective: str, real: PretrainConfig | None) -> Run:
    """The reference: one forward pass over all rows, autograd, torch's AdamW. No engine, no accumulation."""
    from trainer.engine import parameter_groups

    layout = Layout(1, 1, 0, NUM_ROWS, objective, real=real is not None)
    config = make_config(layout, real)
    torch.manual_seed(config.seed)
    model = Emu(config.model, config.objective, len(config.data.sources))
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim), betas=(0.9, 0.98), eps=1e-6)
    variance, run = START_VARIANCE, Run(start=copy_of(model))
    for step, (batch,) in enumerate(own_batches(config, layout, Topology())):
        text, image = count_targets(batch, config)
        unit = variance if config.objective.target_normalisation == "variance" else 1.0
        z = model.encode(batch.images).detach() if len(batch.images) else None
        names = ("input_ids", "document_ids", "position_ids", "images", "image_starts", "image_counts")
        inputs = {name: getattr(batch, name) for name in (*names, "document_sources", "document_ok")}
        outputs = model(**inputs, text_scale=1 / max(1, text), image_scale=1 / unit / max(1, image))
        optimizer.zero_grad()
        outputs["loss"].backward()
        if step == 0:
            run.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        # Not by clip_grad_norm_ itself: over a million values its sum in fp32 is off by 2e-5.
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        run.norms.append(float(torch.stack(squares).sum().sqrt()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        sums = outputs["text_loss"].sum(), outputs["image_loss"].sum()
        run.losses.append((float(sums[0]) / max(1, text), float(sums[1]) / max(1, image)))
        run.counts.append((text, image))
        for row in batch.keys:
            for key in row:
                run.samples[key.source] = run.samples.get(key.source, 0) + 1
        for (source, reason), number in batch.all_skips().items():
            run.skips[f"{source}: {reason}"] = run.skips.get(f"{source}: {reason}", 0) + number
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


def gathered(engine: Any, topology: Topology) -> dict[str, Tensor]:
    """The whole weights of a layout."""
    import deepspeed

    is_split = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=is_split):
        return whole(copy_of(engine.module), engine.module, topology)


def pretend_that_the_cpu_is_the_cuda_device() -> None:
    """Where megatron-core makes the buffers of sequence parallelism; it does not ask for more."""
    from trainer import engine

    engine.check_device = lambda parallel: None
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def run_layout(layout: Layout, topology: Topology, real: PretrainConfig | None) -> Run:
    from trainer.diagnostics import TargetVariance, loss_metrics
    from trainer.engine import build_engine, set_process_options
    from trainer.loop import training_step
    from trainer.state import TrainState, sample_counts

    config, run = make_config(layout, real), Run()
    set_process_options(config.parallel, config.seed)
    if layout.sequence:
        pretend_that_the_cpu_is_the_cuda_device()
    engine = build_engine(config, topology)
    run.start = gathered(engine, topology)
    record_first_gradients(engine, run.gradients)
    state = TrainState(variance=TargetVariance(START_VARIANCE))
    for batches in own_batches(config, layout, topology):
        result = training_step(engine, batches, state, config, topology)
        losses = loss_metrics(result.sums, list(config.data.sources))
        run.losses.append((losses["loss/text"], losses["loss/image"]))
        run.norms.append(result.grad_norm)
        run.counts.append((result.counts.text_targets, result.counts.image_targets))
        state.record(batches)
    counts = sample_counts(state, topology)
    run.samples, run.skips = counts["samples"], counts["skips"]
    run.weights = gathered(engine, topology)
    run.gradients = whole(run.gradients, engine.module, topology)
    engine.destroy()
    return run


def run_layouts(layouts: dict[str, Layout], real: PretrainConfig | None) -> dict[str, Run]:
    """All of these, which have one world size, and the plain runs if it is one process."""
    import logging

    logging.disable(logging.WARNING)
    from megatron.core import parallel_state

    from trainer.engine import init_distributed

    runs: dict[str, Run] = {}
    for tp in sorted({layout.tp for layout in layouts.values()}) or [1]:
        parallel_state.destroy_model_parallel()
        topology = init_distributed(ParallelConfig(timeout_minutes=HANG_MINUTES, tensor=tp))
        runs |= {name: run_layout(layout, topology, real) for name, layout in layouts.items() if layout.tp == tp}
    if topology.world_size == 1:
        runs |= {objective: run_plain(objective, None) for objective in OBJECTIVES}
        runs |= {f"real {objective}": run_plain(objective, real) for objective in OBJECTIVES if real}
    return runs


def run_all(
    layouts: dict[str, Layout], real: PretrainConfig | None, run_distributed: Callable[..., list[Any]]
) -> dict[str, list[Run]]:
    """Of every layout, the runs by rank; "paper", "real paper", ... are the plain ones. A start a world size."""
    results: dict[str, list[Run]] = {}
    for world_size in sorted({layout.dp * layout.tp for layout in layouts.values()} | {1}):
        here = {name: layout for name, layout in layouts.items() if layout.dp * layout.tp == world_size}
        by_rank = run_distributed(run_layouts, world_size, here, real, init_group=False, timeout_s=1200.0)
        results |= {name: [of_rank[name] for of_rank in by_rank] for name in by_rank[0]}
    return results
