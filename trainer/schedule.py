"""Learning rate and objective weights as functions of the step."""

from __future__ import annotations

import math

from models.config import ObjectiveConfig
from trainer.config import OptimConfig


def lr_factor(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate for update `step` (0-based): linear warm-up, then cosine (Emu section 3.2)."""
    if optim.schedule == "constant":
        return 1.0
    warmup_steps = round(optim.warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * cosine


def image_weight(step: int, objective: ObjectiveConfig) -> float:
    """Weight of the regression loss at `step`: 0 during the delay, then a linear warm-up."""
    since = step - objective.image_weight_delay_steps
    if since < 0:
        return 0.0
    return objective.image_weight * min(1.0, (since + 1) / (objective.image_weight_warmup_steps + 1))
