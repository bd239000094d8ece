"""Gradient norm of each part of the model, before clipping: what DeepSpeed computes for the whole anyway, kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

DIRECT, OFFLOADED = "get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"


class PartNorms:
    """Norms by the part of the model that a group of parameters belongs to (`parameter_groups` in engine.py).

    ZeRO 1-3 compute the norm of the whole from those of their groups. Elsewhere `squares` is filled by the loop (fp32
    at ZeRO-0), or stays empty (DeepSpeed's bf16 optimizers at ZeRO 0 and 1, which take all groups in one).
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.squares: dict[str, Tensor] = {}
        self._norms: list[Tensor] = []
        optimizer = engine.optimizer
        for name in (DIRECT, OFFLOADED):
            if hasattr(optimizer, name) and engine.zero_optimization_stage() > 0:
                setattr(optimizer, name, self._kept(getattr(optimizer, name)))
        self._parts = _parts_of_groups(optimizer)

    def _kept(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            norm = compute(*args, **kwargs)
            self._norms.append(norm)
            return norm

        return wrapped

    def take(self, wanted: bool) -> dict[str, float]:
        """Since the last call, of the last step; {} if not wanted, so that nothing is read from the device."""
        norms, squares = self._norms[-len(self._parts) :], self.squares
        self._norms, self.squares = [], {}
        if not wanted:
            return {}
        if len(norms) == len(self._parts):
            sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
            for part, norm in zip(self._parts, norms, strict=True):
                sums[part] = sums[part] + torch.as_tensor(norm).double().cpu() ** 2
            squares = dict(sums)
        return {part: float(square) ** 0.5 for part, square in squares.items()}


def part_of_group(name: str) -> str:
    return name.removesuffix("_undecayed")


def _parts_of_groups(optimizer: Any) -> list[str]:
    """Of each norm that DeepSpeed computes, in its order: one a group, at ZeRO-3 one a sub-group."""
    names = [part_of_group(group["name"]) for group in optimizer.param_groups]
    if hasattr(optimizer, "sub_group_to_group_id"):
        return [names[optimizer.sub_group_to_group_id[number]] for number in range(len(optimizer.fp16_groups))]
    return names
