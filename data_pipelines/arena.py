"""Where a worker leaves decoded pictures for the main process."""

from __future__ import annotations

import math
import mmap

import numpy as np


def make_arena(num_slots: int, num_images: int, image_size: int) -> np.ndarray:
    """uint8 [num_slots, num_images, 3, image_size, image_size], shared with the processes that are forked later.

    It takes up memory only where it has been written. Slots are used again and again: a fresh shared page costs the
    kernel several times as much as the copy of the pixels, and /dev/shm is small in containers.
    """
    shape = (num_slots, num_images, 3, image_size, image_size)
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
