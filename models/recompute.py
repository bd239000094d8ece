"""Activation checkpointing: what a forward pass need not keep is computed again in the backward pass.

selective: in the language model rotary embedding, attention and the gate of the feed-forward, which cost little time
and much memory (Korthikanti et al. 2022); no matrix product with weights is done twice. full: every block of all three
networks keeps its inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recompute(wanted: bool, function: Callable[..., T], *args: object) -> T:
    """function(*args), without keeping what it computes on the way if `wanted`."""
    return checkpoint(function, *args, use_reentrant=False) if wanted else function(*args)
