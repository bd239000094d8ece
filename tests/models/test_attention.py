"""packed_causal_attention against a dense-mask softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.attention import LENGTH_STEP, PADDING_PIECE, GroupedLayout, VarlenLayout, pack_layout
from models.attention import packed_causal_attention as attend
from tests.models.varlen_stand_ins import STAND_INS, stand_in

HEADS, HEAD_WIDTH = 4, 8


def document_ids(rows: list[list[int]], row_length: int) -> Tensor:
    """int32 [B, S]: rows of document lengths, negative for padding; padding (0) at the end."""
    ids = torch.zeros(len(rows), row_length, dtype=torch.int32)
    for r, lengths in enumerate(rows):
        numbers = torch.tensor([d if length > 0 else 0 for d, length in enumerate(lengths, start=1)])
        filled = torch.repeat_interleave(numbers, torch.tensor(lengths).abs())
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
    "every document is one position": ([[1] * 11, [1] * 9], 11),
    "padding first, between documents, and more than a piece of it": ([[-3, 6, -2, 5], [4, -PADDING_PIECE, 3]], 151),
    "rows of padding only between others": ([[-19], [19], [-19], [7, 5]], 19),
    "a batch of padding only": ([[-21], [-21]], 21),
}


@pytest.fixture(params=["sdpa", *STAND_INS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name that pack_layout takes; the flash kernels are stand-ins."""
    return "sdpa" if request.param == "sdpa" else stand_in(request.param, monkeypatch)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", ROWS)
def test_equals_dense_softmax_with_gradients(case: str, num_kv_heads: int, backend: str) -> None:
    """Outputs at the positions of documents and all gradients of q, k, v within 1e-12 in float64; padding has none."""
    ids = document_ids(*ROWS[case])
    real = ids > 0
    q = torch.randn(*ids.shape, HEADS, HEAD_WIDTH, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(*ids.shape, num_kv_heads, HEAD_WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    packed = attend(q, k, v, pack_layout(ids, backend))[real]
    dense = dense_attention(q, k, v, ids)[real]
    torch.testing.assert_close(packed, dense, rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(dense)
    actual = torch.autograd.grad(packed, (q, k, v), upstream)
    expected = torch.autograd.grad(dense, (q, k, v), upstream)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert not one[~real].any()


def test_padding_neither_changes_a_document_nor_becomes_nan(backend: str) -> None:
    ids = document_ids([[9, 4], [11]], 24)
    q, k, v = (torch.randn(*ids.shape, HEADS, HEAD_WIDTH) for _ in range(3))
    layout = pack_layout(ids, backend)
    before = attend(q, k, v, layout)
    for tensor in (q, k, v):
        tensor[ids == 0] = 1e4
    after = attend(q, k, v, layout)
    assert torch.equal(before[ids > 0], after[ids > 0])
    assert after.isfinite().all()


def test_deterministic_algorithms_reach_the_flash_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in asserts that it is told."""
    layout = pack_layout(torch.ones(1, 5, dtype=torch.int32), stand_in("flash_attn", monkeypatch))
    torch.use_deterministic_algorithms(True)
    try:
        attend(*(torch.randn(1, 5, HEADS, HEAD_WIDTH) for _ in range(3)), layout)
    finally:
        torch.use_deterministic_algorithms(False)


def test_few_calls_for_many_lengths() -> None:
    """Lengths 1 .. 3 x LENGTH_STEP fall into three groups, padding into the same."""
    ids = document_ids([[length] for length in range(1, 3 * LENGTH_STEP + 1)], 3 * LENGTH_STEP)
    layout = pack_layout(ids)
    assert isinstance(layout, GroupedLayout)
    assert [length for _, length in layout.shapes] == [LENGTH_STEP, 2 * LENGTH_STEP, 3 * LENGTH_STEP]


def test_long_padding_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is nearly all padding costs what short documents cost, in either layout."""
    ids = document_ids([[20]], 9 * PADDING_PIECE)
    varlen, grouped = pack_layout(ids, stand_in("varlen of torch 2.11", monkeypatch)), pack_layout(ids)
    assert isinstance(varlen, VarlenLayout) and isinstance(grouped, GroupedLayout)
    assert varlen.offsets.tolist() == [0, 20, *range(PADDING_PIECE, 9 * PADDING_PIECE + 1, PADDING_PIECE)]
    assert varlen.longest == PADDING_PIECE == max(length for _, length in grouped.shapes)
