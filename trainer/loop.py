"""A training step: count targets, forward and backward, agree with all ranks, update or throw the step away."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from conf import UserError
from data_pipelines.document import Batch
from models.objective import find_targets
from trainer.config import PretrainConfig
from trainer.diagnostics import StepSums
from trainer.discard import discard_step
from trainer.gradient_norms import PartNorms, part_of_group
from trainer.guards import Problem, judge
from trainer.phases import Phases
from trainer.schedule import image_weight, lr_factor
from trainer.state import TrainState
from trainer.topology import Topology

MODEL_INPUTS = (
    "input_ids",
    "document_ids",
    "position_ids",
    "images",
    "image_starts",
    "document_sources",
    "document_ok",
)


@dataclass
class StepCounts:
    """Counts of one step over all ranks; `digest` tells two steps' samples apart whatever the ranks were."""

    text_targets: int
    image_targets: int
    tokens: int
    images: int
    digest: int


@dataclass
class StepResult:
    """grad_norm: before clipping; None where the step was thrown away without one. flags: those that any rank set.

    problem: why the step was thrown away; the same on all ranks.
    """

    counts: StepCounts
    sums: StepSums
    grad_norm: float | None
    flags: list[bool]
    problem: Problem | None


@dataclass
class Instruments:
    """What watches a step from the side. norms: None = the parts' norms are not kept."""

    phases: Phases = field(default_factory=Phases)
    norms: PartNorms | None = None


def training_step(
    engine: DeepSpeedEngine,
    batches: list[Batch],
    state: TrainState,
    config: PretrainConfig,
    topology: Topology,
    flags: Callable[[], Sequence[bool]] = tuple,
    instruments: Instruments | None = None,
) -> StepResult:
    """One optimizer step over the micro-batches of this rank.

    Both losses are sums over targets divided by the global number of targets, so the gradient does not depend on how
    rows are spread over ranks and micro-batches. DeepSpeed averages over the data-parallel ranks: hence dp_size.
    flags: asked once backward is done; for all ranks to know in the result. Every rank gives as many.
    """
    instruments = instruments or Instruments()
    phases = instruments.phases
    with phases("prepare"):
        agree_on_failures(batches, topology, engine.device)
        inputs = [model_inputs(batch, engine.device) for batch in batches]
        counts = count_step(batches, inputs, config, topology)
    text_scale = topology.dp_size * config.objective.text_weight / max(1, counts.text_targets)
    weight = image_weight(state.step, config.objective) * state.variance.factor(config.objective)
    image_scale = topology.dp_size * weight / max(1, counts.image_targets)

    sums = StepSums()
    for number, micro_batch in enumerate(inputs, start=1):
        with phases("forward"):
            outputs = engine(**micro_batch, text_scale=text_scale, image_scale=image_scale)
        with phases("backward"):
            # A new tensor: at ZeRO-0 DeepSpeed's hook on the module's own output divides by the accumulation steps.
            engine.backward(outputs["loss"] * 1.0, scale_wrt_gas=False)
        sums.add(outputs)
        if number < len(inputs):
            engine.step()  # DeepSpeed counts micro-batches here; only the last call updates
    with phases("agree"):
        agreed = sums.reduce(flags(), topology)
    text_loss = sums.text_loss()
    problem = judge(agreed.offenders, text_loss, state.history, config.guard)
    _set_learning_rates(engine, lr_factor(state.step, config.total_steps, config.optim))
    with phases("optimizer"):
        norm = None if problem else _update(engine, topology, instruments.norms)
        if problem:
            discard_step(engine)
    if norm is not None and not math.isfinite(norm):
        problem = Problem("gradient is not a number")
    state.count_step(text_loss, sums, problem, config.guard)
    return StepResult(counts, sums, norm, agreed.flags, problem)


def _update(engine: DeepSpeedEngine, topology: Topology, norms: PartNorms | None) -> float:
    """Gradient norm before clipping. Where it is not finite, weights and optimizer stay as they are."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        engine.step()
        return float(engine.get_global_grad_norm())
    squares = _squared_norms(engine, topology)
    if norms is not None:
        norms.squares = squares
    norm = float(sum(squares.values())) ** 0.5
    if math.isfinite(norm):
        engine.step()
    else:
        discard_step(engine)
    return norm


def _squared_norms(engine: DeepSpeedEngine, topology: Topology) -> dict[str, torch.Tensor]:
    """Of the gradient by part of the model, at ZeRO-0 in fp32, where DeepSpeed does not keep the norm."""
    parts = {part_of_group(group["name"]): number for number, group in enumerate(engine.optimizer.param_groups)}
    whole, sharded = torch.zeros(2, 1 + max(parts.values()), dtype=torch.float64, device=engine.device)
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                rows = torch.linalg.vector_norm(parameter.grad, dim=-1)  # fp64 throughout takes ten times as long
                square = torch.linalg.vector_norm(rows, dtype=torch.float64) ** 2
                is_sharded = getattr(parameter, "tensor_model_parallel", False)
                (sharded if is_sharded else whole)[parts[part_of_group(group["name"])]] += square
    if topology.tp_size > 1:
        dist.all_reduce(sharded, group=topology.tp_group)
    squares = (whole + sharded).cpu()
    return {part: squares[number] for part, number in parts.items()}


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    tensors = {name: getattr(batch, name).to(device, non_blocking=True) for name in MODEL_INPUTS}
    return {**tensors, "image_counts": batch.image_counts}


def agree_on_failures(batches: list[Batch], topology: Topology, device: torch.device) -> None:
    """A picture that one rank of a tensor-parallel group could not decode takes its document from all of them.

    The rank with the document's first broken picture counts it, and the first rank what was left out before packing:
    over all ranks every sample is then counted once, with the reason that one process would give. Collective.
    """
    if topology.tp_size == 1:
        return
    _check_same_rows(batches, topology, device)
    failed_at = torch.cat([torch.where(batch.document_ok, topology.tp_size, topology.tp_rank) for batch in batches], 1)
    failed_at = failed_at.to(device)
    dist.all_reduce(failed_at, dist.ReduceOp.MIN, group=topology.tp_group)
    widths = [batch.document_ok.shape[1] for batch in batches]
    for batch, first in zip(batches, failed_at.cpu().split(widths, dim=1), strict=True):
        batch.document_ok &= first == topology.tp_size
        batch.failures = {at: why for at, why in batch.failures.items() if first[at] == topology.tp_rank}
        if topology.tp_rank > 0:
            batch.skips = {}


def _check_same_rows(batches: list[Batch], topology: Topology, device: torch.device) -> None:
    """A store that answered one rank of a tensor-parallel group and not another may have given them other rows, and so
    their layers would mix two texts."""
    digest = sum(number * samples_digest(batch) for number, batch in enumerate(batches, start=1))
    ends = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MIN, group=topology.tp_group)
    if ends.tolist() != [digest, -digest]:
        raise UserError(
            "the ranks of a tensor-parallel group have read different rows, as happens when data.skip_unreachable "
            "passes over a chunk on one of them only: go on from the last checkpoint with the same command"
        )


def _set_learning_rates(engine: DeepSpeedEngine, factor: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def count_step(
    batches: list[Batch], inputs: list[dict[str, Any]], config: PretrainConfig, topology: Topology
) -> StepCounts:
    """Targets, tokens, images and sample digest of the step, summed over micro-batches and ranks."""
    local = torch.zeros(5, dtype=torch.int64)
    for batch, tensors in zip(batches, inputs, strict=True):
        targets = find_targets(
            tensors["input_ids"],
            tensors["document_ids"],
            tensors["document_ok"],
            tensors["document_sources"],
            tensors["image_starts"],
            config.model.causal_transformer.num_queries,
            config.model.language_model.text_vocab_size,
        )
        local += torch.tensor(
            [
                len(targets.text_positions),
                targets.image_positions.numel(),
                int((batch.document_ids > 0).sum()),
                len(batch.image_starts),
                samples_digest(batch),
            ]
        )
    total = local.to(inputs[0]["input_ids"].device)
    dist.all_reduce(total, group=topology.dp_group)
    return StepCounts(*total.tolist())


def samples_digest(batch: Batch) -> int:
    """Sum over rows of a 40-bit hash of their sample keys: the same however rows are spread over ranks."""
    digests = (hashlib.blake2b(repr(keys).encode(), digest_size=5).digest() for keys in batch.keys)
    return sum(int.from_bytes(digest, "big") for digest in digests)


def fetch(stream: Iterator[Batch], number: int) -> list[Batch]:
    """The micro-batches of a step."""
    return [next(stream) for _ in range(number)]


def fill_of(batches: list[Batch], max_images_per_row: int) -> dict[str, float]:
    """How full the rows are: shares of their positions and of their image places."""
    positions = sum(batch.document_ids.numel() for batch in batches)
    rows = sum(len(batch.document_ids) for batch in batches)
    return {
        "token_fill": sum(int((batch.document_ids > 0).sum()) for batch in batches) / positions,
        "image_fill": sum(len(batch.image_starts) for batch in batches) / (rows * max_images_per_row),
    }
