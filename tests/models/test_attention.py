"""packed_causal_attention against a dense-mask softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.attention import LENGTH_STEP, pack_layout, packed_causal_attention

HEADS, HEAD_WIDTH = 4, 8


def document_ids(rows: list[list[int]], row_length: int) -> Tensor:
    """int32 [B, S]: rows of document lengths, padding (0) at the end."""
    ids = torch.zeros(len(rows), row_length, dtype=torch.int32)
    for r, lengths in enumerate(rows):
        filled = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
        ids[r, : len(filled)] = filled.int()
    return ids


def dense_attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Softmax over a whole S x S matrix per row and head; each group of query heads shares a key-value head."""
    row_length, group = q.shape[1], q.shape[2] // k.shape[2]
    mixed = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) / math.sqrt(q.shape[3])
        same = ids[:, :, None] == ids[:, None, :]
        past = torch.ones(row_length, row_length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~(same & past), float("-inf")).softmax(dim=-1)
        mixed.append(weights @ v[:, :, head // group])
    return torch.stack(mixed, dim=2)


ROWS = {
    "one document fills the row": ([[40]], 40),
    "several lengths, padding at the end": ([[5, 17, 1, 16], [33]], 48),
    "neighbouring rows have equal ids at the border": ([[32], [32], [7]], 32),
    "shorter than the padded length": ([[1], [2, 3]], LENGTH_STEP - 1),
}


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", ROWS)
def test_equals_dense_softmax_with_gradients(case: str, num_kv_heads: int) -> None:
    """Outputs and gradients of q, k, v within 1e-12 in float64, at the positions of documents."""
    ids = document_ids(*ROWS[case])
    real = ids > 0
    q = torch.randn(*ids.shape, HEADS, HEAD_WIDTH, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(*ids.shape, num_kv_heads, HEAD_WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    packed = packed_causal_attention(q, k, v, pack_layout(ids))[real]
    dense = dense_attention(q, k, v, ids)[real]
    torch.testing.assert_close(packed, dense, rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(dense)
    actual = torch.autograd.grad(packed, (q, k, v), upstream)
    expected = torch.autograd.grad(dense, (q, k, v), upstream)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_padding_neither_changes_a_document_nor_becomes_nan() -> None:
    ids = document_ids([[9, 4], [11]], 24)
    q, k, v = (torch.randn(*ids.shape, HEADS, HEAD_WIDTH) for _ in range(3))
    layout = pack_layout(ids)
    before = packed_causal_attention(q, k, v, layout)
    for tensor in (q, k, v):
        tensor[ids == 0] = 1e4
    after = packed_causal_attention(q, k, v, layout)
    assert torch.equal(before[ids > 0], after[ids > 0])
    assert after.isfinite().all()


def test_few_calls_for_many_lengths() -> None:
    """Lengths 1 .. 3 x LENGTH_STEP fall into three groups."""
    ids = document_ids([[length] for length in range(1, 3 * LENGTH_STEP + 1)], 3 * LENGTH_STEP)
    assert [group.shape[1] for group in pack_layout(ids).groups] == [LENGTH_STEP, 2 * LENGTH_STEP, 3 * LENGTH_STEP]
