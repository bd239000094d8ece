"""Block-diagonal causal attention over packed rows, without a row x row mask.

Shapes: B rows of S positions, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH_STEP = 16
"""Documents are padded to a multiple of this, so that few different lengths (and so few calls) remain."""


@dataclass
class PackedLayout:
    """Where the documents of a batch stand; made once, used by every layer.

    groups: per padded length L an int64 [n, L] of flat positions (row * S + column); trailing padding repeats the
    document's last position, which causality hides. scatter: int64 [B * S], the place of each position among the
    concatenated group outputs (padding positions read place 0; nothing reads them).
    """

    groups: list[Tensor]
    scatter: Tensor


def pack_layout(document_ids: Tensor) -> PackedLayout:
    """Group the documents of int [B, S] `document_ids` (0 = padding, constant runs = documents) by padded length."""
    ids = document_ids.cpu()
    starts, lengths = _document_spans(ids)
    padded = (lengths + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP
    groups, scatter, taken = [], torch.zeros(ids.numel(), dtype=torch.int64), 0
    for length in padded.unique().tolist():
        start, real = starts[padded == length, None], lengths[padded == length, None]
        step = torch.arange(length)[None, :]
        places = start + torch.minimum(step, real - 1)
        inside = step < real
        scatter[places[inside]] = taken + torch.arange(places.numel()).view_as(places)[inside]
        taken += places.numel()
        groups.append(places.to(document_ids.device))
    return PackedLayout(groups, scatter.to(document_ids.device))


def _document_spans(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Flat start and length of every document, in reading order."""
    num_columns = document_ids.shape[1]
    flat = document_ids.flatten()
    first = torch.ones_like(flat, dtype=torch.bool)
    first[1:] = flat[1:] != flat[:-1]
    first[::num_columns] = True
    starts = first.nonzero().squeeze(1)
    lengths = torch.diff(starts, append=torch.tensor([flat.numel()]))
    real = flat[starts] > 0
    return starts[real], lengths[real]


def packed_causal_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Causal attention inside each document. q [B, S, H, D], k and v [B, S, K, D] -> [B, S, H, D].

    H is a multiple of K (grouped-query attention). Positions of padding give arbitrary finite values.
    """
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    flat = torch.cat([q, k, v], dim=2).flatten(0, 1)
    outputs = []
    for places in layout.groups:
        heads = flat[places].transpose(1, 2)  # [n, H + 2K, L, D]
        q_, k_, v_ = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        mixed = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=num_heads != num_kv_heads)
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
    if not outputs:  # a batch of padding only
        return q
    return torch.cat(outputs)[layout.scatter].view_as(q)
