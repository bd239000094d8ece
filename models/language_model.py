"""LLaMA on megatron-core's tensor-parallel layers. Parameter names are Hugging Face LLaMA's.

Shapes: B rows of S positions, W width, H heads of D, K key-value heads, V vocabulary. Under tensor parallelism each
rank holds H / tp heads and V / tp rows; hidden states are whole on every rank.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.parallel_state import get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from models.attention import PackedLayout, pack_layout, packed_causal_attention
from models.config import LanguageModelConfig


def megatron_config() -> ModelParallelConfig:
    """CPU initialisation gives the same weights for every tensor-parallel size."""
    return ModelParallelConfig(
        tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
    )


def rotary_frequencies(config: LanguageModelConfig) -> Tensor:
    """Angle a position, fp32 [D / 2]: RoPE (Su et al. 2021), scaled to longer texts as LLaMA-2's users and LLaMA-3 do.

    linear: all angles divided by the factor. llama3: those of waves longer than the original text are, those of short
    ones are not, those between are blended.
    """
    width = config.width_of_head
    frequencies = 1.0 / config.rope_base ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    scaled = frequencies / config.rope_factor
    if config.rope_scaling == "none":
        return frequencies
    if config.rope_scaling == "linear":
        return scaled
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    waves_in_text = config.rope_original_positions * frequencies / (2 * math.pi)
    kept = ((waves_in_text - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * scaled + kept * frequencies


def rotary_tables(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin of RoPE, fp32 [B, S, 1, D], in Hugging Face's half-split order."""
    angles = position_ids[..., None].float() * frequencies.to(position_ids.device)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, S, heads, D]; computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + rotated * sin).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: LanguageModelConfig, megatron: ModelParallelConfig) -> None:
        super().__init__()
        self.head_width = config.width_of_head
        column = partial(_column, megatron=megatron, std=config.init_std)
        self.q_proj = column(config.width, config.num_heads * self.head_width)
        self.k_proj = column(config.width, config.num_kv_heads * self.head_width)
        self.v_proj = column(config.width, config.num_kv_heads * self.head_width)
        self.o_proj = _row(config.num_heads * self.head_width, config.width, megatron, config.residual_std)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
        q, k, v = (
            projection(x)[0].unflatten(-1, (-1, self.head_width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = packed_causal_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, layout)
        return self.o_proj(mixed.flatten(2))[0]


class Mlp(nn.Module):
    def __init__(self, config: LanguageModelConfig, megatron: ModelParallelConfig) -> None:
        super().__init__()
        self.gate_proj = _column(config.width, config.mlp_width, megatron, config.init_std)
        self.up_proj = _column(config.width, config.mlp_width, megatron, config.init_std)
        self.down_proj = _row(config.mlp_width, config.width, megatron, config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)[0]) * self.up_proj(x)[0])[0]


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageModelConfig, megatron: ModelParallelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = SelfAttention(config, megatron)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config, megatron)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Embedding table and decoder; the heads are modules of their own, called at target positions only."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        assert config.text_vocab_size > 0, "text_vocab_size is filled in from the tokenizer before the model is built"
        megatron = megatron_config()
        self.frequencies = rotary_frequencies(config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocabulary,
            config.width,
            init_method=partial(nn.init.normal_, std=config.init_std),
            config=megatron,
        )
        self.layers = nn.ModuleList(DecoderLayer(config, megatron) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, embeddings: Tensor, document_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Input embeddings [B, S, W] of packed rows -> final normed hidden states [B, S, W]."""
        cos, sin = rotary_tables(position_ids, self.frequencies)
        layout = pack_layout(document_ids)
        x = embeddings
        for layer in self.layers:
            x = layer(x, cos, sin, layout)
        return self.norm(x)


def _column(in_width: int, out_width: int, megatron: ModelParallelConfig, std: float) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        in_width,
        out_width,
        config=megatron,
        init_method=partial(nn.init.normal_, std=std),
        bias=False,
        gather_output=False,
    )


def _row(in_width: int, out_width: int, megatron: ModelParallelConfig, std: float) -> RowParallelLinear:
    return RowParallelLinear(
        in_width,
        out_width,
        config=megatron,
        init_method=partial(nn.init.normal_, std=std),
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
