"""Forward passes between two training steps that leave nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

COUNTER = "applied_pre_backward_ref_cnt"
"""Where ZeRO-3 counts the forward passes of a module whose backward pass is still to come."""


@contextmanager
def evaluating(engine: DeepSpeedEngine) -> Iterator[nn.Module]:
    """The module, to be called directly (the engine would count micro-batches), without gradients and dropout.

    All ranks must call it equally often. Weights, gradients, random states, DeepSpeed's counters and, at ZeRO-3, the
    order in which training will want the weights, are afterwards what they were.
    """
    module, was_training = engine.module, engine.module.training
    offload = getattr(engine.optimizer, "parameter_offload", None)
    module.eval()
    try:
        with torch.no_grad():
            if offload is None:
                yield module
            else:
                with _own_trace(offload), _same_counters(module):
                    yield module
    finally:
        module.train(was_training)


@contextmanager
def _own_trace(offload: Any) -> Iterator[None]:
    """ZeRO-3 fetches ahead by the order of modules that it has seen, which is forward and backward in training: passes
    without backward get a record of their own, kept from one validation to the next."""
    of_training = offload.param_coordinator
    if not hasattr(offload, "evaluation_coordinator"):
        own = copy.copy(of_training)
        own._clear_trace_structures()  # before a first step it has lists that a copy would share
        if not own.is_invalid_trace():
            own._invalidate_trace()
        offload.evaluation_coordinator = own
    offload.param_coordinator = offload.evaluation_coordinator
    try:
        yield
    finally:
        offload.param_coordinator = of_training


@contextmanager
def _same_counters(module: nn.Module) -> Iterator[None]:
    before = {part: part.__dict__.get(COUNTER, 0) for part in module.modules()}
    yield
    for part, count in before.items():
        if COUNTER in part.__dict__:
            part.__dict__[COUNTER] = count
