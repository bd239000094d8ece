"""Emu's Causal Transformer: a T5 decoder that turns vision tokens into N causal embeddings (pure torch; exported).

Shapes: M images, P vision tokens of width V, N learned queries of width W, output width D (the language model's).
Each block is causal self-attention over the queries, cross-attention to every vision token, and a ReLU feed-forward,
all pre-norm with T5's RMSNorm, no biases, no 1/sqrt(d) scaling (Raffel et al. 2020; Emu section 2.1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """T5's unidirectional buckets, int64 [length, length]: exact up to num_buckets / 2, then logarithmic."""
    position = torch.arange(length)
    distance = (position[:, None] - position[None, :]).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, logarithmic)


class Linear(nn.Linear):
    """Starts normal of `std`, the bias 0; drawn where nn.Linear's constructor does, for ZeRO-3 splits the parameters of
    a module over the ranks as soon as it is constructed."""

    def __init__(self, in_width: int, out_width: int, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(in_width, out_width, bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Unscaled multi-head attention from [M, N, W] to keys and values of [M, K, key_width]."""

    def __init__(self, width: int, key_width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        inner = num_heads * head_width
        self.num_heads = num_heads
        self.q = Linear(width, inner, std=(width * head_width) ** -0.5)
        self.k = Linear(key_width, inner, std=key_width**-0.5)
        self.v = Linear(key_width, inner, std=key_width**-0.5)
        self.o = Linear(inner, width, std=inner**-0.5)

    def forward(self, x: Tensor, keys: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        q, k, v = (
            projection(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, source in ((self.q, x), (self.k, keys), (self.v, keys))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0, dropout_p=dropout)
        return self.o(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.wi = Linear(width, hidden, std=width**-0.5)
        self.wo = Linear(hidden, width, std=hidden**-0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(F.relu(self.wi(x))))


class PositionBias(nn.Embedding):
    """One number a bucket of distances and head; starts normal of `std`."""

    def __init__(self, num_buckets: int, num_heads: int, std: float) -> None:
        self.std = std
        super().__init__(num_buckets, num_heads)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class CausalBlock(nn.Module):
    def __init__(
        self,
        vision_width: int,
        width: int,
        num_heads: int,
        head_width: int,
        mlp_width: int,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_norm = nn.RMSNorm(width, eps=norm_eps)
        self.self_attention = Attention(width, width, num_heads, head_width)
        self.cross_norm = nn.RMSNorm(width, eps=norm_eps)
        self.cross_attention = Attention(width, vision_width, num_heads, head_width)
        self.mlp_norm = nn.RMSNorm(width, eps=norm_eps)
        self.mlp = FeedForward(width, mlp_width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, vision_tokens: Tensor, causal_bias: Tensor) -> Tensor:
        dropout = self.dropout.p if self.training else 0.0
        h = self.self_norm(x)
        x = x + self.dropout(self.self_attention(h, h, causal_bias, dropout))
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), vision_tokens, None, dropout))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class CausalTransformer(nn.Module):
    """Vision tokens [M, P, V] -> visual embeddings [M, N, D] as they enter the language model.

    With `recompute` a block keeps its inputs alone for the backward pass and is computed again there.
    """

    recompute = False

    def __init__(
        self,
        vision_width: int,
        output_width: int,
        num_queries: int,
        width: int,
        num_layers: int,
        num_heads: int,
        head_width: int,
        mlp_width: int,
        position_buckets: int,
        position_max_distance: int,
        norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.position_buckets = position_buckets
        self.position_max_distance = position_max_distance
        self.queries = nn.Parameter(torch.empty(1, num_queries, width))
        self.relative_attention_bias = PositionBias(position_buckets, num_heads, std=width**-0.5)
        self.blocks = nn.ModuleList(
            CausalBlock(vision_width, width, num_heads, head_width, mlp_width, norm_eps, dropout)
            for _ in range(num_layers)
        )
        self.final_norm = nn.RMSNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.projection = Linear(width, output_width, std=INIT_STD, bias=True)
        nn.init.normal_(self.queries, std=INIT_STD)

    def causal_bias(self) -> Tensor:
        """[1, heads, N, N]: T5's relative position bias, -inf above the diagonal; shared by all blocks."""
        length = self.queries.shape[1]
        buckets = relative_position_buckets(length, self.position_buckets, self.position_max_distance)
        bias = self.relative_attention_bias(buckets.to(self.queries.device)).permute(2, 0, 1).unsqueeze(0)
        future = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
        return bias.masked_fill(future, float("-inf"))

    def forward(self, vision_tokens: Tensor) -> Tensor:
        bias = self.causal_bias()
        x = self.dropout(self.queries.expand(vision_tokens.shape[0], -1, -1))
        for block in self.blocks:
            inputs = (x, vision_tokens, bias)
            x = checkpoint(block, *inputs, use_reentrant=False) if self.recompute else block(*inputs)
        return self.projection(self.dropout(self.final_norm(x)))
