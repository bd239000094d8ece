"""Activation checkpointing: what a forward pass need not keep is made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

MODES = ("none", "selective", "full")
"""selective: in the language model rotary embedding, attention and the gate of the feed-forward, which cost little time
and much memory (Korthikanti et al. 2022); no matrix product with weights is done twice. full: also every block of all
three networks keeps its input alone."""

T = TypeVar("T")


def recompute(wanted: bool, function: Callable[..., T], *args: object) -> T:
    """function(*args), without keeping what it computes on the way if `wanted`."""
    return checkpoint(function, *args, use_reentrant=False) if wanted else function(*args)
