"""The presets' parameter counts, piece by piece, against the published sizes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from models.emu import Emu
from trainer.config import compose_config

LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320
"""Published totals at a vocabulary of 32,000, both embedding tables included."""
SPECIAL_TOKENS = 4


@cache
def preset(name: str) -> Emu:
    """Built without memory or random numbers."""
    config = compose_config([f"+experiment={name}", "data=demo"])
    with torch.device("meta"):
        return Emu(config.model, config.objective, num_sources=5)


def count(module: nn.Module) -> int:
    assert all(parameter.is_meta for parameter in module.parameters())
    return sum(parameter.numel() for parameter in module.parameters())


def eva_clip_g(with_norm_and_head: bool) -> int:
    """EVA-01-CLIP-g/14 of 40 blocks: width 1408, mlp 6144, 257 tokens, head to 1024."""
    width, mlp, tokens, patch = 1408, 6144, 257, 3 * 14 * 14
    attention = 3 * width**2 + 2 * width + width**2 + width
    block = attention + (width * mlp + mlp) + (mlp * width + width) + 2 * 2 * width
    trunk = (patch * width + width) + width + tokens * width + 40 * block
    return trunk + (2 * width + width * 1024 + 1024 if with_norm_and_head else 0)


def t5_base_decoder(output_width: int) -> int:
    """12 blocks of width 768, mlp 3072, keys and values of the cross-attention from 1408; 32 queries, 32 x 12 position
    biases; projection with a bias."""
    width, mlp, vision = 768, 3072, 1408
    block = 4 * width**2 + (2 * width**2 + 2 * vision * width) + 2 * width * mlp + 3 * width
    return 32 * width + 12 * block + 32 * 12 + width + width * output_width + output_width


@pytest.mark.parametrize(("name", "width", "llama"), [("emu_7b", 4096, LLAMA_7B), ("emu_14b", 5120, LLAMA_13B)])
def test_pieces(name: str, width: int, llama: int) -> None:
    model = preset(name)
    assert count(model.vision_encoder) - count(model.vision_encoder.ln_visual) == eva_clip_g(with_norm_and_head=False)
    assert count(model.vision_encoder.ln_visual) == 2816
    assert count(model.causal_transformer) == t5_base_decoder(width)
    special_rows = 2 * SPECIAL_TOKENS * width
    assert count(model.language_model) + count(model.text_head) == llama + special_rows
    assert count(model.regression_head) == width**2


def test_quoted_totals() -> None:
    """Emu's quoted numbers, at the precision at which they are quoted."""
    model = preset("emu_14b")
    assert round(eva_clip_g(with_norm_and_head=True) / 1e6, 1) == 1012.6
    assert round(count(model.causal_transformer) / 1e6, 1) == 129.0
    assert round((count(model.language_model) + count(model.text_head)) / 1e6, 1) == 13015.9
    assert round(count(model.regression_head) / 1e6, 1) == 26.2
    unused = eva_clip_g(with_norm_and_head=True) - eva_clip_g(with_norm_and_head=False)
    assert round((count(model) + unused) / 1e9, 2) == 14.18


@pytest.mark.parametrize("name", ["emu_7b", "emu_14b"])
def test_published_shapes(name: str) -> None:
    """Shapes that counts do not tell apart."""
    model = preset(name)
    assert model.vision_encoder.pos_embed.shape == (1, 257, 1408)
    assert model.vision_encoder.blocks[0].attn.num_heads == 16
    assert model.causal_transformer.queries.shape == (1, 32, 768)
    assert model.causal_transformer.relative_attention_bias.weight.shape == (32, 12)
    assert model.causal_transformer.position_max_distance == 128
    assert model.config.language_model.width_of_head == 128
    assert model.language_model.embed_tokens.weight.shape[0] == model.text_head.weight.shape[0] == 32_004
    assert model.config.causal_transformer.dropout == 0.0
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)} == {1e-6}


@pytest.mark.parametrize("name", ["emu_7b", "emu_14b"])
def test_presets_take_the_papers_objective(name: str) -> None:
    objective = compose_config([f"+experiment={name}", "data=demo"]).objective
    assert (objective.text_weight, objective.image_weight) == (1.0, 1.0)
    assert (objective.target_normalisation, objective.regression_gradient) == ("none", "full")
    assert objective.image_weight_delay_steps == objective.image_weight_warmup_steps == 0
