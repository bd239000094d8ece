"""Oracle: the same slices taken with torch.chunk and flatten from a tensor whose values are their own positions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.weights.fragments import Fragment, copy_overlap, overlaps, whole

TP_SIZES = (1, 2, 3, 6)


def expected(fragment: Fragment) -> torch.Tensor:
    values = torch.arange(math.prod(fragment.shape)).view(fragment.shape)
    if fragment.tp_dim is not None:
        values = values.chunk(fragment.tp_size, fragment.tp_dim)[fragment.tp_rank]
    return values.contiguous().flatten()[fragment.offset : fragment.offset + fragment.length]


def layout(shape: tuple[int, ...], tp_dim: int | None, tp_size: int, num_parts: int) -> list[Fragment]:
    """All fragments of one layout: every shard in num_parts equal slices, the last ones shorter or empty."""
    shard_numel = math.prod(shape) // tp_size
    part = -(-shard_numel // num_parts)
    starts = [min(k * part, shard_numel) for k in range(num_parts)]
    return [
        Fragment("w", shape, tp_dim, tp_rank, tp_size, start, min(part, shard_numel - start))
        for tp_rank in range(tp_size)
        for start in starts
    ]


@st.composite
def two_layouts(draw: st.DrawFn) -> tuple[list[Fragment], list[Fragment]]:
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    tp_dim = draw(st.sampled_from([None, *range(len(shape))]))
    if tp_dim is not None:
        shape[tp_dim] *= math.lcm(*TP_SIZES)
    sizes = st.sampled_from(TP_SIZES if tp_dim is not None else (1,))
    parts = st.integers(1, 5)
    return tuple(layout(tuple(shape), tp_dim, draw(sizes), draw(parts)) for _ in range(2))  # type: ignore[return-value]


@settings(max_examples=300, deadline=None)
@given(two_layouts())
def test_any_layout_is_put_together_from_any_other(layouts: tuple[list[Fragment], list[Fragment]]) -> None:
    sources, targets = layouts
    for target in targets:
        values, num_copied = torch.full((target.length,), -1), 0
        for source in sources:
            for overlap in overlaps(source, target):
                first, last = overlap.source_range
                copy_overlap(expected(source)[first:last], values, overlap)
                num_copied += overlap.numel
        assert num_copied == target.length, "every element in exactly one overlap"
        assert torch.equal(values, expected(target))


def test_a_slice_that_crosses_rows_meets_a_column_band_in_three_pieces() -> None:
    band = Fragment("w", (4, 6), tp_dim=1, tp_rank=1, tp_size=2, offset=0, length=12)
    crossing = Fragment("w", (4, 6), None, 0, 1, offset=4, length=18)
    assert [overlap.numel for overlap in overlaps(crossing, band)] == [2, 6, 1]


def test_source_range_is_the_least_that_must_be_read() -> None:
    (overlap,) = overlaps(whole("w", (4, 6)), Fragment("w", (4, 6), 1, 1, 3, offset=2, length=4))
    assert overlap.source_range == (8, 16)


def test_a_fragment_beyond_its_shard_is_a_programmer_error() -> None:
    with pytest.raises(AssertionError):
        replace(whole("w", (4, 6)), offset=1)
