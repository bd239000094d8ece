"""Arithmetic of checkpoint fragments: contiguous 1-D slices of (tensor-parallel shards of) parameters.

A parameter of global shape [a, b, c, d] that is split over tensor-parallel ranks in dimension 2 is seen as a matrix
[a * b, c * d]: a shard is then a band of columns, and a slice of a flattened shard is at most three rectangles (the end
of a row, whole rows, the beginning of a row). Two slices of any layouts meet in rectangles again, so moving weights
from one layout to another is a few strided copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """`length` elements from `offset` on of flattened shard `tp_rank` of `tp_size`, split in dimension `tp_dim`.

    A parameter that every tensor-parallel rank holds whole has tp_dim None, tp_rank 0 and tp_size 1. `shape` is the
    global shape, whatever the layout.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    tp_rank: int
    tp_size: int
    offset: int
    length: int

    def __post_init__(self) -> None:
        assert 0 <= self.tp_rank < self.tp_size and (self.tp_dim is not None or self.tp_size == 1)
        assert self.tp_dim is None or self.shape[self.tp_dim] % self.tp_size == 0
        assert self.offset >= 0 and self.length >= 0 and self.offset + self.length <= self.shard_numel

    @property
    def shard_numel(self) -> int:
        return math.prod(self.shape) // self.tp_size


@dataclass(frozen=True)
class Overlap:
    """Elements two fragments share: `rows` runs of `columns` elements, each with its start and stride in either one."""

    rows: int
    columns: int
    source_start: int
    source_stride: int
    target_start: int
    target_stride: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def source_range(self) -> tuple[int, int]:
        """Smallest range of the source that holds all shared elements."""
        return self.source_start, self.source_start + (self.rows - 1) * self.source_stride + self.columns


def whole(name: str, shape: tuple[int, ...]) -> Fragment:
    """The complete parameter as one fragment."""
    return Fragment(name, shape, tp_dim=None, tp_rank=0, tp_size=1, offset=0, length=math.prod(shape))


def overlaps(source: Fragment, target: Fragment) -> Iterator[Overlap]:
    """What two fragments of the same parameter share; every shared element is in exactly one `Overlap`."""
    assert (source.name, source.shape) == (target.name, target.shape)
    split_dim = source.tp_dim if source.tp_dim is not None else target.tp_dim
    assert target.tp_dim in (None, split_dim), "a parameter is split in the same dimension in every layout"
    matrix_width = math.prod(source.shape[split_dim or 0 :])
    target_rectangles = list(_rectangles(target, matrix_width))
    for a in _rectangles(source, matrix_width):
        for b in target_rectangles:
            top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
            left, right = max(a.left, b.left), min(a.right, b.right)
            if top < bottom and left < right:
                yield Overlap(
                    bottom - top,
                    right - left,
                    *_locate(source, matrix_width, top, left),
                    *_locate(target, matrix_width, top, left),
                )


def copy_overlap(source: Tensor, target: Tensor, overlap: Overlap) -> None:
    """Copy one overlap. `source` begins at the overlap's `source_range`; `target` is the whole target fragment."""
    assert source.is_contiguous() and target.is_contiguous()
    size = (overlap.rows, overlap.columns)
    target_view = target.as_strided(size, (overlap.target_stride, 1), target.storage_offset() + overlap.target_start)
    target_view.copy_(source.as_strided(size, (overlap.source_stride, 1), source.storage_offset()))


@dataclass(frozen=True)
class _Rectangle:
    top: int
    bottom: int
    left: int
    right: int


def _band(fragment: Fragment, matrix_width: int) -> tuple[int, int]:
    """First column and width of the fragment's shard; an unsplit parameter is one band as wide as the matrix."""
    width = matrix_width // fragment.tp_size
    return fragment.tp_rank * width, width


def _rectangles(fragment: Fragment, matrix_width: int) -> Iterator[_Rectangle]:
    """The fragment as at most three rectangles of the matrix, none empty."""
    column, width = _band(fragment, matrix_width)
    position, end = fragment.offset, fragment.offset + fragment.length
    while position < end:
        row, start = divmod(position, width)
        whole_rows = (end - position) // width if start == 0 else 0
        if whole_rows:
            yield _Rectangle(row, row + whole_rows, column, column + width)
            position += whole_rows * width
        else:
            stop = min(width, start + end - position)
            yield _Rectangle(row, row + 1, column + start, column + stop)
            position += stop - start


def _locate(fragment: Fragment, matrix_width: int, row: int, column: int) -> tuple[int, int]:
    """Index within the fragment of a matrix element, and the distance between rows."""
    first, width = _band(fragment, matrix_width)
    return row * width + column - first - fragment.offset, width
