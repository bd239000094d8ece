"""Bytes on one device at the fullest moment of a training step, in closed form, part by part.

Counts tensors: not the CUDA context, not the buffers of NCCL, not what the allocator loses to fragmentation. Rows are
taken to be full. `make bench-memory` compares it with what torch's profiler sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.activations import (
    MicroBatch,
    Numerics,
    Saved,
    causal_transformer,
    heads,
    language_model,
    vision_encoder,
)
from launch.parameters import count_parameters
from models.config import ModelConfig
from trainer.config import MAX_BUCKET

FP32 = 4
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 weight and Adam's two moments: in the files, and in the host's copy from which they are written."""
NUMBER_BYTES = {"bf16": 2, "fp32": 4}
MAX_GATHERED = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at a time (stage3_max_live_parameters), and updates at a time (sub_group_size)."""


@dataclass(frozen=True)
class Layout:
    """How a step is spread over devices; the names are those of `parallel.*`.

    accumulates: several micro-batches a step, so gradients wait through the later ones. device: cuda | cpu. Flash
    attention for rows is taken to be there on CUDA in bf16, unless attention=sdpa.
    """

    zero_stage: int
    dp: int = 1
    tensor: int = 1
    sequence: bool = False
    activation_checkpointing: str = "none"
    precision: str = "fp32"
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    attention: str = "auto"
    accumulates: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at a moment of the step; the parts add up to `total`.

    weights: with those that ZeRO-3 has gathered. optimizer: Adam's moments and, with ZeRO or in bf16, fp32 weights.
    activations: with the gradients that pass through them. logits: chunk of the text head. buffers: of the reduction of
    gradients and of the update.
    """

    moment: str
    weights: float
    gradients: float
    optimizer: float
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


@dataclass(frozen=True)
class Networks:
    """Parameters on a tensor-parallel rank by part, in the order of the backward pass, and what each part has saved."""

    names: tuple[str, ...]
    parameters: tuple[float, ...]
    saved: tuple[Saved, ...]


def networks(model: ModelConfig, batch: MicroBatch, layout: Layout) -> Networks:
    """Text head and regression head, language model, Causal Transformer, vision encoder. The encoders are whole on
    every tensor-parallel rank and each takes its share of the images, one (blank) at least."""
    is_cuda = layout.device == "cuda"
    takes_heads = model.language_model.width_of_head % 8 == 0  # as models/attention_backend.py says
    varlen = is_cuda and layout.precision == "bf16" and layout.attention != "sdpa" and takes_heads
    how = Numerics(NUMBER_BYTES[layout.precision], layout.activation_checkpointing, is_cuda, varlen)
    language, tp = model.language_model, layout.tensor
    counts = count_parameters(model)
    text_head = language.vocabulary * language.width
    images = max(1.0, batch.images / tp)
    return Networks(
        ("heads", "language model", "causal transformer", "vision encoder"),
        (
            text_head / tp + counts["regression head"],
            (counts["language model"] - text_head) / tp,
            counts["causal transformer"],
            counts["vision encoder"],
        ),
        (
            heads(model, batch, tp, how),
            language_model(language, batch.rows * batch.seq_len, tp, layout.sequence, how),
            causal_transformer(model.causal_transformer, model.vision, language.width, images, how),
            vision_encoder(model.vision, images, how),
        ),
    )


def resting(num_parameters: float, layout: Layout) -> Memory:
    """Between steps: ZeRO divides Adam's state from stage 1 on, gradients from 2, weights from 3 (Rajbhandari et al.
    2020). Only ZeRO-0 in fp32 updates the weights themselves; else Adam has fp32 weights of its own."""
    stage, width = layout.zero_stage, NUMBER_BYTES[layout.precision]
    masters = 0 if stage == 0 and layout.precision == "fp32" else FP32
    weights = width * num_parameters / (layout.dp if stage == 3 else 1)
    optimizer = (2 * FP32 + masters) * num_parameters / (layout.dp if stage >= 1 else 1)
    # Stage 3 never gives back its partition of the gradients and its bucket.
    gradients = width * num_parameters / layout.dp if stage == 3 else 0.0
    buffers = width * min(MAX_BUCKET, num_parameters) if stage == 3 else 0.0
    if layout.offload_optimizer == "cpu":
        optimizer = gradients = 0.0
    if layout.offload_parameters == "cpu":
        weights = 0.0
    return Memory("between steps", weights, gradients, optimizer, buffers=buffers)


def forward_end(model: ModelConfig, batch: MicroBatch, layout: Layout) -> Memory:
    """Everything that backward needs is kept, and nothing else."""
    parts = networks(model, batch, layout)
    rest = resting(sum(parts.parameters), layout)
    return replace(_with_gathered(rest, parts, layout), moment="forward", activations=_kept(parts.saved))


def moments(model: ModelConfig, batch: MicroBatch, layout: Layout) -> Iterator[Memory]:
    """The moments of a step at one of which memory is fullest: each network's backward pass begins, gradients are
    reduced, Adam updates."""
    parts = networks(model, batch, layout)
    total = sum(parts.parameters)
    rest = resting(total, layout)
    running = _with_gathered(rest, parts, layout)
    done = 0.0
    for number, (name, saved) in enumerate(zip(parts.names, parts.saved, strict=True)):
        is_heads = number == 0
        if is_heads:  # its gradients are made at the first chunk of logits
            done += parts.parameters[0]
        gradients, buffers = _gradients(done, total, layout)
        yield replace(
            running,
            moment=f"backward, {name}",
            gradients=running.gradients + gradients,
            buffers=running.buffers + buffers,
            activations=_kept(parts.saved[number:]) + (0 if is_heads else saved.workspace),
            logits=saved.workspace if is_heads else 0.0,
        )
        done += 0 if is_heads else parts.parameters[number]
    yield _update(rest, parts, layout)
    yield _reduction(running, total, layout)


def peak(model: ModelConfig, batch: MicroBatch, layout: Layout) -> Memory:
    return max(moments(model, batch, layout), key=lambda memory: memory.total)


def _kept(saved: tuple[Saved, ...]) -> float:
    return sum(part.kept for part in saved)


def _with_gathered(rest: Memory, parts: Networks, layout: Layout) -> Memory:
    """ZeRO-3 gathers weights as they are used, and lets go of them beyond a limit only."""
    if layout.zero_stage < 3 or layout.dp == 1:
        return rest
    gathered = NUMBER_BYTES[layout.precision] * min(MAX_GATHERED, sum(parts.parameters))
    return replace(rest, weights=rest.weights + gathered)


def _gradients(done: float, total: float, layout: Layout) -> tuple[float, float]:
    """Gradients and buffers of their reduction when the backward pass has come through `done` parameters.

    Stages 0 and 1 keep all until the end. Stage 2 moves them through a bucket into this rank's partition, stage 3 into
    its resting one; a bucket that is full before the end has its reduced copy beside it.
    """
    width, stage = NUMBER_BYTES[layout.precision], layout.zero_stage
    bucket = width * min(MAX_BUCKET, total)
    reduced = bucket if total > MAX_BUCKET else 0.0
    if stage <= 1:
        return width * (total if layout.accumulates else done), bucket if stage == 1 else 0.0
    if stage == 2:
        partition = 0 if layout.offload_optimizer == "cpu" else (total if layout.accumulates else done) / layout.dp
        return width * partition if total > MAX_BUCKET or layout.accumulates else 0.0, bucket + reduced
    return 0.0, reduced


def _reduction(running: Memory, total: float, layout: Layout) -> Memory:
    """After backward: stages 0 and 1 copy a bucket of gradients at a time, 2 and 3 the last one."""
    width, stage = NUMBER_BYTES[layout.precision], layout.zero_stage
    bucket = width * min(MAX_BUCKET, total)
    gradients = {0: total, 1: total, 2: max(0.0, total - MAX_BUCKET) / layout.dp, 3: 0.0}[stage]
    copies = {0: int(layout.dp > 1), 1: 1, 2: 2, 3: 1}[stage]
    return replace(
        running,
        moment="reduction of gradients",
        gradients=running.gradients + width * gradients,
        buffers=running.buffers + copies * bucket,
    )


def _update(rest: Memory, parts: Networks, layout: Layout) -> Memory:
    """The fused AdamW needs no memory of its own, but DeepSpeed gives it fp32 copies of gradients: in bf16 without ZeRO
    all at once, with ZeRO flat ones, of one learning rate's parameters at a time."""
    width, stage = NUMBER_BYTES[layout.precision], layout.zero_stage
    total = sum(parts.parameters)
    if layout.offload_optimizer == "cpu":
        return replace(rest, moment="update")
    gradients = {0: total, 1: total, 2: total / layout.dp, 3: 0.0}[stage]
    group = max(parts.parameters[0] + parts.parameters[1], *parts.parameters[2:])
    copied = min(group, MAX_GATHERED) if stage == 3 else group
    flat = (FP32 + (width if layout.precision == "bf16" else 0)) * copied / layout.dp
    if stage == 0:
        flat = FP32 * total if layout.precision == "bf16" else 0.0
    return replace(rest, moment="update", gradients=rest.gradients + width * gradients, buffers=rest.buffers + flat)
