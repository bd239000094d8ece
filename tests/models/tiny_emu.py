"""A small Emu, hand-laid batches for it, and how gradients are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig, ObjectiveConfig, VisionConfig
from models.emu import Emu

TEXT_VOCAB = 20
BOS, EOS = 1, 2
PAD, IMG, IMG_END, IMAGE = range(TEXT_VOCAB, TEXT_VOCAB + 4)
NUM_QUERIES = 3
PICTURE = [IMG, *[IMAGE] * NUM_QUERIES, IMG_END]
IMAGE_SIZE = 8
NUM_SOURCES = 3


@dataclass(frozen=True)
class Doc:
    """Token ids, the number of its source, and whether its pictures could be decoded."""

    ids: list[int]
    source: int = 0
    ok: bool = True


def tiny_config() -> ModelConfig:
    return ModelConfig(
        name="test",
        vision=VisionConfig(image_size=IMAGE_SIZE, patch_size=4, width=16, num_layers=2, num_heads=2, mlp_width=24),
        causal_transformer=CausalTransformerConfig(
            num_queries=NUM_QUERIES, width=16, num_layers=2, num_heads=2, head_width=8, mlp_width=24
        ),
        language_model=LanguageModelConfig(
            text_vocab_size=TEXT_VOCAB, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=48, init_std=0.2
        ),
    )


def tiny_emu(regression_gradient: str = "full") -> Emu:
    """Same weights at every call. Vision weights are drawn wide, so that different images differ visibly."""
    torch.manual_seed(7)
    model = Emu(tiny_config(), ObjectiveConfig(regression_gradient=regression_gradient), NUM_SOURCES)
    with torch.no_grad():
        for parameter in model.vision_encoder.parameters():
            parameter.normal_(std=0.3)
    return model


def lay_out(rows: list[list[Doc]], row_length: int) -> dict[str, Any]:
    """The model's inputs for rows of documents, one after another, padding at the end; pixels are random."""
    shape = (len(rows), row_length)
    input_ids, document_ids = torch.full(shape, PAD), torch.zeros(shape, dtype=torch.int32)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    most = max(map(len, rows))
    sources = torch.full((len(rows), most), -1)
    document_ok = torch.zeros(len(rows), most, dtype=torch.bool)
    starts: list[list[int]] = []
    for r, row in enumerate(rows):
        column = 0
        for d, document in enumerate(row):
            for position, token in enumerate(document.ids):
                input_ids[r, column], document_ids[r, column], position_ids[r, column] = token, d + 1, position
                if token == IMG:
                    starts.append([r, column])
                column += 1
            sources[r, d], document_ok[r, d] = document.source, document.ok
    pixels = torch.Generator().manual_seed(1)
    return {
        "input_ids": input_ids,
        "document_ids": document_ids,
        "position_ids": position_ids,
        "images": torch.randint(256, (len(starts), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=pixels),
        "image_starts": torch.tensor(starts, dtype=torch.int64).reshape(-1, 2),
        "image_counts": [len(starts)],
        "document_sources": sources,
        "document_ok": document_ok,
    }


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """d loss / d parameter by name, zeros for a parameter that the loss does not reach."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each difference is below tolerance x the parameter's own norm, or a thousandth of the whole norm if larger."""
    assert actual.keys() == expected.keys()
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        difference = (actual[name] - value).norm()
        assert difference <= tolerance * torch.maximum(value.norm(), 1e-3 * whole), f"{name}: {difference:.3e}"
