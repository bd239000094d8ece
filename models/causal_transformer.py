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


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """T5's unidirectional buckets, int64 [length, length]: exact up to num_buckets / 2, then logarithmic."""
    position = torch.arange(length)
    distance = (position[:, None] - position[None, :]).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, logarithmic)


class Attention(nn.Module):
    """Unscaled multi-head attention from [M, N, W] to keys and values of [M, K, key_width]."""

    def __init__(self, width: int, key_width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        inner = num_heads * head_width
        self.num_heads = num_heads
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(key_width, inner, bias=False)
        self.v = nn.Linear(key_width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        nn.init.normal_(self.q.weight, std=(width * head_width) ** -0.5)
        nn.init.normal_(self.k.weight, std=key_width**-0.5)
        nn.init.normal_(self.v.weight, std=key_width**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

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
        self.wi = nn.Linear(width, hidden, bias=False)
        self.wo = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.wi.weight, std=width**-0.5)
        nn.init.normal_(self.wo.weight, std=hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(F.relu(self.wi(x))))


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
    """Vision tokens [M, P, V] -> visual embeddings [M, N, D] as they enter the language model."""

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
        self.relative_attention_bias = nn.Embedding(position_buckets, num_heads)
        self.blocks = nn.ModuleList(
            CausalBlock(vision_width, width, num_heads, head_width, mlp_width, norm_eps, dropout)
            for _ in range(num_layers)
        )
        self.final_norm = nn.RMSNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, output_width)
        nn.init.normal_(self.queries, std=0.02)
        nn.init.normal_(self.relative_attention_bias.weight, std=width**-0.5)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

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
            x = block(x, vision_tokens, bias)
        return self.projection(self.dropout(self.final_norm(x)))
