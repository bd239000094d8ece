"""Memory on the host that tensors of a device are copied into, again and again."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SLAB = 1 << 28
"""Bytes. torch rounds every block of pinned memory up to a power of two: one for each tensor would take up to twice as
much as the tensors."""
ALIGNMENT = 64


class HostMemory:
    """A place for each key, kept for good: fresh pages cost as much as the copy. Pinned for copies from a GPU."""

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """The tensor's values in the place of `key`. From a GPU they are there once its stream is synchronised."""
        place = self._places.get(key)
        if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            place = self._take(tensor.nbytes, tensor.is_cuda).view(tensor.dtype).view(tensor.shape)
            self._places[key] = place
        return place.copy_(tensor, non_blocking=True)

    def _take(self, size: int, pinned: bool) -> Tensor:
        """Bytes that nothing else uses."""
        needed = -(-size // ALIGNMENT) * ALIGNMENT
        if needed > SLAB:
            return _allocate(size, pinned)
        if needed > len(self._slab):
            self._slab = _allocate(SLAB, pinned)
        taken, self._slab = self._slab[:size], self._slab[needed:]
        return taken


def _allocate(size: int, pinned: bool) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        if not pinned:
            raise
        log.warning("no pinned memory for checkpoints (%s): copies into other memory take longer", error)
        return torch.empty(size, dtype=torch.uint8)
