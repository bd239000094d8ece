"""LLaMA on megatron-core's tensor-parallel layers. Parameter names are Hugging Face LLaMA's.

Shapes: B rows of S positions, W width, H heads of D, K key-value heads, V vocabulary. Under tensor parallelism each
rank holds H / tp heads and V / tp rows. Between the layers hidden states are [T, W], T = B S positions, whole on every
rank; with sequence parallelism (Korthikanti et al. 2022) each rank holds T / tp of them there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.parallel_state import get_tensor_model_parallel_group, get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from models.attention import PackedLayout, pack_layout, packed_causal_attention
from models.attention_backend import attention_backend
from models.config import LanguageModelConfig
from models.recompute import recompute
from models.tensor_parallel import enter_column_parallel


def megatron_config(sequence_parallel: bool = False) -> ModelParallelConfig:
    """CPU initialisation gives the same weights for every tensor-parallel size."""
    return ModelParallelConfig(
        tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
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
    """cos, sin of RoPE, fp32 [..., 1, D] for positions [...], in Hugging Face's half-split order."""
    angles = position_ids[..., None].float() * frequencies.to(position_ids.device)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [..., heads, D]; computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + rotated * sin).to(x.dtype)


@dataclass(frozen=True)
class Parallelism:
    """sequence: hidden states between the layers are spread over the tensor-parallel group. recompute: what is computed
    again in the backward pass, none | selective | full (models/recompute.py)."""

    sequence: bool = False
    recompute: str = "none"


ON_ITS_OWN = Parallelism()


class SelfAttention(nn.Module):
    def __init__(self, config: LanguageModelConfig, parallelism: Parallelism) -> None:
        super().__init__()
        self.parallelism = parallelism
        self.head_width = config.width_of_head
        self.q_proj = _column(config.width, config.num_heads * self.head_width, config.init_std)
        self.k_proj = _column(config.width, config.num_kv_heads * self.head_width, config.init_std)
        self.v_proj = _column(config.width, config.num_kv_heads * self.head_width, config.init_std)
        self.o_proj = _row(config.num_heads * self.head_width, config.width, config.residual_std, parallelism)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
        x = enter_column_parallel(x, self.parallelism.sequence)
        q, k, v = (
            projection(x)[0].unflatten(-1, (-1, self.head_width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = recompute(self.parallelism.recompute == "selective", _rotate_and_mix, q, k, v, cos, sin, layout)
        return self.o_proj(mixed.flatten(1))[0]


def _rotate_and_mix(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
    q, k, v = apply_rotary(q, cos, sin)[None], apply_rotary(k, cos, sin)[None], v[None]
    return packed_causal_attention(q, k, v, layout).squeeze(0)


class Mlp(nn.Module):
    def __init__(self, config: LanguageModelConfig, parallelism: Parallelism) -> None:
        super().__init__()
        self.parallelism = parallelism
        self.gate_proj = _column(config.width, config.mlp_width, config.init_std)
        self.up_proj = _column(config.width, config.mlp_width, config.init_std)
        self.down_proj = _row(config.mlp_width, config.width, config.residual_std, parallelism)

    def forward(self, x: Tensor) -> Tensor:
        x = enter_column_parallel(x, self.parallelism.sequence)
        gate, up = self.gate_proj(x)[0], self.up_proj(x)[0]
        return self.down_proj(recompute(self.parallelism.recompute == "selective", _swiglu, gate, up))[0]


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageModelConfig, parallelism: Parallelism) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = SelfAttention(config, parallelism)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config, parallelism)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Embedding table and decoder; the heads are modules of their own, called at target positions only."""

    def __init__(self, config: LanguageModelConfig, parallelism: Parallelism = ON_ITS_OWN) -> None:
        super().__init__()
        assert config.text_vocab_size > 0, "text_vocab_size is filled in from the tokenizer before the model is built"
        self.config, self.parallelism = config, parallelism
        self.embed_tokens = VocabParallelEmbedding(
            config.vocabulary,
            config.width,
            init_method=partial(nn.init.normal_, std=config.init_std),
            config=megatron_config(),
            tp_group=get_tensor_model_parallel_group(),
        )
        self.layers = nn.ModuleList(DecoderLayer(config, parallelism) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, embeddings: Tensor, document_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Input embeddings [B, S, W] of packed rows -> final normed hidden states [B, S, W].

        UserError where the attention kernel that the configuration names cannot run.
        """
        cos, sin = rotary_tables(position_ids.flatten(), rotary_frequencies(self.config))
        kernel, head_width = self.config.attention, self.config.width_of_head
        layout = pack_layout(document_ids, attention_backend(kernel, embeddings.device, embeddings.dtype, head_width))
        x = embeddings.flatten(0, 1)
        if self.parallelism.sequence:
            x = scatter_to_sequence_parallel_region(x, group=get_tensor_model_parallel_group())
        for layer in self.layers:
            x = recompute(self.parallelism.recompute == "full", layer, x, cos, sin, layout)
        x = self.norm(x)
        if self.parallelism.sequence:  # every rank's heads read all positions and give the whole gradient of each
            group = get_tensor_model_parallel_group()
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)
        return x.view_as(embeddings)

    def norms(self) -> list[nn.Parameter]:
        """Weights that a rank applies to its own positions alone when these are spread over the group."""
        return [module.weight for module in self.modules() if isinstance(module, nn.RMSNorm)]


def _column(in_width: int, out_width: int, std: float) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        in_width,
        out_width,
        config=megatron_config(),
        init_method=partial(nn.init.normal_, std=std),
        bias=False,
        gather_output=False,
        disable_grad_reduce=True,
        tp_group=get_tensor_model_parallel_group(),
    )


def _row(in_width: int, out_width: int, std: float, parallelism: Parallelism) -> RowParallelLinear:
    return RowParallelLinear(
        in_width,
        out_width,
        config=megatron_config(parallelism.sequence),
        init_method=partial(nn.init.normal_, std=std),
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=get_tensor_model_parallel_group(),
    )
