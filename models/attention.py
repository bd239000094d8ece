"""Block-diagonal causal attention over packed rows, without a row x row mask.

Shapes: B rows of S positions, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention_backend import VarlenKernel, varlen_kernel

LENGTH_STEP = 16
"""Grouped documents are padded to a multiple of this, so that few different lengths (and so few calls) remain."""

PADDING_PIECE = 128
"""Padding is cut into documents of at most this length, so that its attention costs next to nothing."""


@dataclass
class GroupedLayout:
    """Documents copied into groups of equal padded length, one call each.

    shapes: (documents, padded length) of each group. gather: int64 [P], which flat position (row * S + column) each
    place in the groups, laid end to end, is a copy of; a document's last position is repeated up to the padded length,
    which causality hides. scatter: int64 [B * S], the place of each position.
    """

    shapes: list[tuple[int, int]]
    gather: Tensor
    scatter: Tensor


@dataclass
class VarlenLayout:
    """Documents left where they lie, for one call.

    offsets: int32 [n + 1], where each document begins in the rows laid end to end, then B * S. longest: the most
    positions that a document has.
    """

    offsets: Tensor
    longest: int
    kernel: VarlenKernel


PackedLayout = GroupedLayout | VarlenLayout


def pack_layout(document_ids: Tensor, backend: str = "sdpa") -> PackedLayout:
    """Where the documents of int [B, S] `document_ids` (0 = padding, constant runs = documents) stand.

    Made once a batch and used by every layer: it waits for the device once. backend: sdpa | varlen | flash_attn.
    Padding counts as documents, too, so that every position has an output and a gradient.
    """
    bounds = _bounds(document_ids.cpu())
    if backend != "sdpa":
        offsets = bounds.int().to(document_ids.device)
        return VarlenLayout(offsets, int(bounds.diff().max()), varlen_kernel(backend))
    shapes, gather, scatter = _group(bounds[:-1], bounds.diff())
    return GroupedLayout(shapes, gather.to(document_ids.device), scatter.to(document_ids.device))


def _bounds(ids: Tensor) -> Tensor:
    """Flat positions where a row, a document or a piece of padding begins, in reading order, then B * S."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first[:, ::PADDING_PIECE] |= ids[:, ::PADDING_PIECE] == 0
    return torch.cat([first.flatten().nonzero().squeeze(1), torch.tensor([ids.numel()])])


def _group(starts: Tensor, lengths: Tensor) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """shapes, gather and scatter of the documents with these flat starts and lengths, which leave no gap."""
    padded = (lengths + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP
    shapes, gathers, insides = [], [], []
    for length in padded.unique().tolist():
        start, real = starts[padded == length, None], lengths[padded == length, None]
        step = torch.arange(length)[None, :]
        shapes.append((len(start), length))
        gathers.append((start + torch.minimum(step, real - 1)).flatten())
        insides.append((step < real).flatten())
    gather, inside = torch.cat(gathers), torch.cat(insides).nonzero().squeeze(1)
    scatter = torch.empty(len(inside), dtype=torch.int64)
    scatter[gather[inside]] = inside
    return shapes, gather, scatter


def packed_causal_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Causal attention inside each document. q [B, S, H, D], k and v [B, S, K, D] -> [B, S, H, D].

    H is a multiple of K (grouped-query attention). Positions of padding give arbitrary finite values.
    """
    flat_q, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if isinstance(layout, VarlenLayout):
        return layout.kernel(flat_q, flat_k, flat_v, layout.offsets, layout.longest).view_as(q)
    grouped = [_split_groups(tensor, layout) for tensor in (flat_q, flat_k, flat_v)]
    outputs = [_attend_group(*heads).flatten(0, 1) for heads in zip(*grouped, strict=True)]
    return torch.cat(outputs).index_select(0, layout.scatter).view_as(q)


def _split_groups(flat: Tensor, layout: GroupedLayout) -> list[Tensor]:
    """[B * S, heads, D] -> [documents, padded length, heads, D] of each group."""
    parts = flat.index_select(0, layout.gather).split([n * length for n, length in layout.shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, layout.shapes, strict=True)]


def _attend_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n, L, H, D], k and v [n, L, K, D] -> [n, L, H, D]."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if repeats > 1:  # enable_gqa would make L x L scores on CUDA in fp32
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
