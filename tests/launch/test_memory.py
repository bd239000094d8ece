"""The closed form of a step's memory: what networks keep, against torch's profiler; the moments of a step, by hand.

The networks are small, but all that they save is counted, and every term is a share that the tolerance would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from benchmarks.memory_trace import mark, trace
from launch import activations
from launch.activations import MicroBatch, Numerics, Saved, causal_transformer, heads, language_model, vision_encoder
from launch.memory import Layout, moments, peak, resting
from launch.parameters import count_parameters
from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig, VisionConfig
from trainer.config import MAX_BUCKET

KEPT_TOLERANCE, PEAK_TOLERANCE = 0.05, 0.1
ROWS, SEQ_LEN, IMAGES = 2, 320, 6
MODEL = ModelConfig(
    name="test",
    vision=VisionConfig(image_size=112, width=96, num_layers=3, num_heads=3, mlp_width=256),
    causal_transformer=CausalTransformerConfig(width=96, num_layers=3, num_heads=3, head_width=32, mlp_width=256),
    language_model=LanguageModelConfig(
        text_vocab_size=500, width=128, num_layers=4, num_heads=4, num_kv_heads=2, mlp_width=320
    ),
)


@pytest.fixture(scope="module", autouse=True)
def single_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


Part = tuple[nn.Module, Callable[[torch.dtype], tuple[Any, ...]], Callable[[Numerics], Saved]]


def build_language_model(recompute: str) -> Part:
    from models.language_model import LanguageModel, Parallelism

    ids = torch.ones(ROWS, SEQ_LEN, dtype=torch.int32)
    positions = torch.arange(SEQ_LEN).repeat(ROWS, 1)
    config = MODEL.language_model
    return (
        LanguageModel(config, Parallelism(recompute=recompute)),
        lambda dtype: (torch.randn(ROWS, SEQ_LEN, config.width, dtype=dtype, requires_grad=True), ids, positions),
        lambda how: language_model(config, ROWS * SEQ_LEN, 1, False, how),
    )


def build_vision_encoder(recompute: str) -> Part:
    from models.emu import build_vision_encoder

    module, size = build_vision_encoder(MODEL.vision), MODEL.vision.image_size
    module.recompute = recompute == "full"
    return (
        module,
        lambda dtype: (torch.randn(IMAGES, 3, size, size, dtype=dtype),),
        lambda how: vision_encoder(MODEL.vision, IMAGES, how),
    )


def build_causal_transformer(recompute: str) -> Part:
    from models.emu import build_causal_transformer

    width, vision = MODEL.language_model.width, MODEL.vision
    module = build_causal_transformer(MODEL.causal_transformer, vision.width, width)
    module.recompute = recompute == "full"
    num_tokens = 1 + (vision.image_size // vision.patch_size) ** 2
    return (
        module,
        lambda dtype: (torch.randn(IMAGES, num_tokens, vision.width, dtype=dtype, requires_grad=True),),
        lambda how: causal_transformer(MODEL.causal_transformer, vision, width, IMAGES, how),
    )


PARTS = {
    "language model": build_language_model,
    "vision encoder": build_vision_encoder,
    "causal transformer": build_causal_transformer,
}


def measure(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, int]:
    """Bytes that the forward pass keeps, and the most in the backward one, beside weights and their gradients."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        mark("begin")
        output = module(*inputs)
        mark("forward done")
        output.sum().backward()
        mark("end")

    begin, forward, _ = trace(run)
    return forward.begin - begin.begin, forward.peak - begin.begin


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("part", PARTS)
def test_activations_of_a_network(part: str, recompute: str, precision: str) -> None:
    """On the CPU. What came in is kept too, but was there before; pixels are counted as they came as well. The peak in
    fp32 only: the kernels of the CPU make fp32 copies in bf16."""
    dtype, width = (torch.float32, 4) if precision == "fp32" else (torch.bfloat16, 2)
    module, make_inputs, plan = PARTS[part](recompute)
    inputs = make_inputs(dtype)
    kept, most = measure(module.to(dtype), inputs)
    saved = plan(Numerics(width, recompute, fused_norms=False, varlen=False))
    before = inputs[0].nbytes
    if part == "vision encoder":
        before += inputs[0].numel()
    elif part == "causal transformer" or (precision == "bf16" and recompute != "full"):
        before = 0  # the vision encoder's output; a norm keeps its fp32 copy
    assert saved.kept == pytest.approx(kept + before, rel=KEPT_TOLERANCE)
    if precision == "fp32":
        assert saved.kept + saved.workspace == pytest.approx(most + before, rel=PEAK_TOLERANCE)


def test_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three copies of a chunk of logits, of which there are four here, and what the text head is given."""
    from models import text_head

    monkeypatch.setattr(text_head, "CHUNK_LOGITS", 1 << 18)
    monkeypatch.setattr(activations, "CHUNK_LOGITS", 1 << 18)
    language, num_targets = MODEL.language_model, 2080
    head = text_head.LanguageModelHead(language)
    hidden = torch.randn(num_targets, language.width, requires_grad=True)
    kept, most = measure(head, (hidden, torch.randint(500, (num_targets,))))
    saved = heads(
        MODEL, MicroBatch(ROWS, SEQ_LEN, 0, num_targets), 1, Numerics(4, "none", fused_norms=False, varlen=False)
    )
    labels = num_targets * 8
    assert saved.kept == pytest.approx(kept + hidden.nbytes + labels, rel=KEPT_TOLERANCE)
    gradients = hidden.nbytes + head.weight.nbytes
    assert saved.kept + saved.workspace == pytest.approx(most + hidden.nbytes - gradients, rel=PEAK_TOLERANCE)


@pytest.mark.parametrize(
    ("precision", "stage", "parts"),
    [
        ("bf16", 0, (2, 0, 12, 0)),
        ("bf16", 1, (2, 0, 12 / 8, 0)),
        ("bf16", 2, (2, 0, 12 / 8, 0)),
        ("bf16", 3, (2 / 8, 2 / 8, 12 / 8, 2 / 2)),  # the bucket has half of the parameters
        ("fp32", 0, (4, 0, 8, 0)),  # the optimizer has no weights of its own
        ("fp32", 1, (4, 0, 12 / 8, 0)),
        ("fp32", 3, (4 / 8, 4 / 8, 12 / 8, 4 / 2)),
    ],
)
def test_memory_between_steps(precision: str, stage: int, parts: tuple[float, ...]) -> None:
    """The ZeRO paper's own arithmetic for 1 B parameters, 8 GPUs: weights, gradients, optimizer, buffers."""
    assert MAX_BUCKET == 500_000_000
    memory = resting(10**9, Layout(stage, dp=8, precision=precision))
    found = (memory.weights, memory.gradients, memory.optimizer, memory.buffers)
    assert found == pytest.approx([part * 1e9 for part in parts])


def test_what_is_there_at_the_fullest_moment() -> None:
    """Few positions: all gradients and their copy on the way to the other ranks. Many: activations and logits. Then
    recomputing helps, in this order, and so do more devices."""
    wordy = replace(MODEL, language_model=replace(MODEL.language_model, text_vocab_size=50_000))
    weights = 4 * sum(count_parameters(wordy).values())
    # On one rank the end of backward and the update are equally full.
    for dp, fullest, copies in ((1, ("backward, vision encoder", "update"), 0), (2, ("reduction of gradients",), 1)):
        few = peak(wordy, MicroBatch(1, 16, 0, 15), Layout(0, dp=dp, device="cpu"))
        assert few.moment in fullest
        assert few.total == pytest.approx((4 + copies) * weights, rel=1e-3)
    batch = MicroBatch(8, 2048, 8, 8 * 1700)
    totals = [
        peak(MODEL, batch, Layout(0, activation_checkpointing=mode)).total for mode in ("none", "selective", "full")
    ]
    assert totals == sorted(totals, reverse=True) and totals[2] < totals[0] / 2
    assert peak(MODEL, batch, Layout(0)).moment.startswith("backward")
    alone, shared = (peak(MODEL, batch, Layout(0, tensor=tensor)) for tensor in (1, 2))
    assert shared.activations < alone.activations
    assert peak(MODEL, batch, Layout(0, tensor=2, sequence=True)).activations < shared.activations


def test_waiting_gradients() -> None:
    """With several micro-batches a step the gradients of all parameters are there when the first activations go."""
    batch, gradients = MicroBatch(8, 2048, 8, 8 * 1700), 4 * sum(count_parameters(MODEL).values())
    first = next(moments(MODEL, batch, Layout(0, accumulates=True)))
    assert first.gradients == pytest.approx(gradients)
    assert next(moments(MODEL, batch, Layout(0))).gradients < gradients / 2
