"""End a step without an update, at every ZeRO stage: gradients are thrown away, weights and Adam's state stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed import DeepSpeedEngine


def discard_step(engine: DeepSpeedEngine) -> None:
    """In place of the `engine.step()` that would update. Collective, like that one.

    DeepSpeed's optimizers drop a step whose gradient norm is not a number, buffers and counters included; here they are
    told that it is so. Where there is none of them, the update is left out.
    """
    optimizer = engine.optimizer

    def drop(*_: Any, **__: Any) -> None:
        optimizer.overflow = True

    changes: dict[str, Any]
    if hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # ZeRO-3
        changes = {"_overflow_check_and_loss_scale_update": drop}
    elif hasattr(optimizer, "check_grad_overflow"):  # ZeRO-1 and 2
        changes = {"check_grad_overflow": True, "check_overflow": drop}
    elif hasattr(optimizer, "clear_lp_grads"):  # ZeRO-1 in bf16 with gradients summed in fp32
        changes = {"step": lambda closure=None: (optimizer.clear_hp_grads(), optimizer.clear_lp_grads())}
    else:  # torch's AdamW, or DeepSpeed's around it that keeps fp32 copies
        changes = {"step": lambda closure=None: None}
    _with_attributes(optimizer, changes, engine.step)


def _with_attributes(owner: Any, changes: dict[str, Any], action: Callable[[], None]) -> None:
    before = {name: owner.__dict__[name] for name in changes if name in owner.__dict__}
    owner.__dict__.update(changes)
    try:
        action()
    finally:
        for name in changes:
            del owner.__dict__[name]
        owner.__dict__.update(before)
