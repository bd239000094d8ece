"""Where a worker leaves decoded pictures for the main process, which uses them in place."""

from __future__ import annotations

import math
import mmap
import weakref

import numpy as np
import torch

MAX_LENT = 4
"""Items whose pictures the consumer may hold without a copy."""


class Arena:
    """Slots of uint8 [num_images, 3, image_size, image_size], channels-last, that a forked worker and its parent share.

    num_in_flight: items that the worker may have finished before the parent takes one. Slots take up memory only once
    they are written, and are used again and again: a fresh shared page costs the kernel several times as much as the
    copy of its pixels, and /dev/shm is small in containers.
    """

    def __init__(self, num_in_flight: int, num_images: int, image_size: int) -> None:
        num_slots = num_in_flight + 1 + MAX_LENT
        self._slots = _shared((num_slots, num_images, image_size, image_size, 3)).transpose(0, 1, 4, 2, 3)
        self._is_taken = _shared((num_slots,))
        self._num_lent = 0

    def take(self) -> tuple[int, np.ndarray]:
        """In the worker: number and memory of a free slot; the lowest, which is the likeliest to be in the cache."""
        number = self._is_taken.tobytes().index(0)
        self._is_taken[number] = 1
        return number, self._slots[number]

    def lend(self, number: int, num_images: int) -> torch.Tensor:
        """In the parent: the first pictures of a taken slot, which is free again when nothing refers to them.

        They are a copy when the consumer holds many already, so that the worker never runs out of slots.
        """
        images = self._slots[number, :num_images]
        if self._num_lent == MAX_LENT:
            copy = torch.from_numpy(images.copy(order="K"))
            self._is_taken[number] = 0
            return copy
        self._num_lent += 1
        weakref.finalize(images, self._take_back, number).atexit = False
        return torch.from_numpy(images)

    def _take_back(self, number: int) -> None:
        self._num_lent -= 1
        self._is_taken[number] = 0


def _shared(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 zeros, shared with the processes that are forked later."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
