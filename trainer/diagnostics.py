"""Sums of a step over micro-batches and ranks, and what they tell: losses, explained variance, spread, collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import ObjectiveConfig
from models.objective import spread_across_images
from trainer.topology import Topology

NOT_SUMMED = ("loss", "embedding_sample")
VARIANCE_DECAY = 0.9


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step. offenders: ranks whose sums are not finite; flags: which of them any rank set."""

    offenders: list[int]
    flags: list[bool]


@dataclass
class StepSums:
    """The additive outputs of the model, by name, over the micro-batches so far; embedding_sample of the last one."""

    values: dict[str, Tensor] = field(default_factory=dict)
    embedding_sample: Tensor | None = None

    def add(self, outputs: dict[str, Tensor]) -> None:
        self.embedding_sample = outputs["embedding_sample"]
        for name, value in outputs.items():
            if name not in NOT_SUMMED:
                self.values[name] = self.values[name] + value if name in self.values else value.clone()

    def reduce(self, flags: Sequence[bool], topology: Topology) -> Agreement:
        """Sum over the data-parallel ranks, and learn what any rank of the world has to say: one collective, and the
        one read of a step from the device. Sums that are not finite are left out; their ranks are named."""
        vector = torch.cat([value.flatten().double() for value in self.values.values()])
        is_finite = vector.isfinite().all()
        counts = is_finite & (topology.tp_rank == 0)  # a tensor-parallel group computes the same sums
        marks = vector.new_zeros(topology.world_size)
        marks[topology.rank] = ~is_finite
        asked = torch.tensor(flags, dtype=vector.dtype, device=vector.device)
        whole = torch.cat([torch.where(counts, vector, 0.0), marks, asked])
        if topology.world_size > 1:
            dist.all_reduce(whole)
        vector, marks, asked = whole.cpu().split([len(vector), len(marks), len(asked)])
        parts = vector.split([value.numel() for value in self.values.values()])
        shapes = [value.shape for value in self.values.values()]
        self.values = {name: part.view(shape) for name, part, shape in zip(self.values, parts, shapes, strict=True)}
        return Agreement(marks.nonzero().flatten().tolist(), (asked > 0).tolist())

    def text_loss(self) -> float | None:
        """Mean over the targets of the step; None if it has none."""
        targets = self.values["text_targets"].sum()
        return float(self.values["text_loss"].sum() / targets) if targets else None

    def image_variance(self) -> tuple[Tensor, Tensor]:
        """Variance across images and mean square of the visual embeddings, per slot [N]."""
        values = self.values
        return spread_across_images(
            values["embedding_sum"], values["embedding_square"], float(values["num_images"].clamp(min=1))
        )


@dataclass
class TargetVariance:
    """Running variance of the regression targets across images (the unit of target_normalisation=variance)."""

    value: float | None = None

    def factor(self, objective: ObjectiveConfig) -> float:
        """What the regression loss is multiplied by; 0 until a variance has been seen."""
        if objective.target_normalisation == "none":
            return 1.0
        return 0.0 if self.value is None else 1.0 / max(self.value, 1e-8)

    def update(self, sums: StepSums) -> None:
        if sums.values["num_images"] < 2:
            return
        seen = float(sums.image_variance()[0].mean())
        self.value = seen if self.value is None else VARIANCE_DECAY * self.value + (1 - VARIANCE_DECAY) * seen


def loss_metrics(sums: StepSums, source_names: list[str]) -> dict[str, float]:
    """Mean loss per modality, in all and per source; a source without targets in this step is left out."""
    metrics: dict[str, float] = {}
    for modality in ("text", "image"):
        losses, targets = sums.values[f"{modality}_loss"], sums.values[f"{modality}_targets"]
        metrics[f"loss/{modality}"] = float(losses.sum() / targets.sum().clamp(min=1))
        for name, loss, count in zip(source_names, losses, targets, strict=False):  # those without weight have no name
            if count > 0:
                metrics[f"loss/{modality}/{name}"] = float(loss / count)
                metrics[f"targets/{modality}/{name}"] = int(count)
    return metrics


def collapse_metrics(sums: StepSums) -> dict[str, Any]:
    """embedding_spread: deviation across images over root mean square (0 = every image alike).

    explained_variance_first: 1 - error / variance where only context can tell; ..._later: where earlier slots help too.
    What a step with too few images cannot tell is left out.
    """
    if sums.values["num_images"] < 2:
        return {}
    variance, mean_square = sums.image_variance()
    metrics: dict[str, Any] = {
        "embedding_spread": float((variance.mean() / mean_square.mean().clamp(min=1e-12)).sqrt()),
        "embedding_rms": float(mean_square.mean().sqrt()),
        "embedding_std_per_slot": [round(value, 6) for value in variance.sqrt().tolist()],
    }
    if sums.values["slot_count"][0] > 0:
        errors = sums.values["slot_error"] / sums.values["slot_count"]
        explained = 1 - errors[:-1] / variance.clamp(min=1e-12)
        metrics["explained_variance_first"] = float(explained[0])
        if len(explained) > 1:
            metrics["explained_variance_later"] = float(explained[1:].mean())
    return metrics
