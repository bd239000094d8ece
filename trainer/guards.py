"""Steps that must not count: a loss or gradient that is not a number, or a loss that jumps. All ranks judge alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trainer.config import GuardConfig


@dataclass(frozen=True)
class Problem:
    """Why a step was thrown away. ranks: those whose own micro-batches show it; () where only their sum does."""

    reason: str
    ranks: tuple[int, ...] = ()


@dataclass
class LossHistory:
    """Running mean and variance of the text loss over the steps that were kept; part of every checkpoint."""

    mean: float = 0.0
    variance: float = 0.0
    num_steps: int = 0

    def is_spike(self, loss: float, config: GuardConfig) -> bool:
        """Whether the loss is far above what it was lately; never before there is a history."""
        if not config.spike_deviations or self.num_steps < config.history_steps:
            return False
        room = max(config.spike_deviations * math.sqrt(self.variance), config.spike_share * abs(self.mean))
        return loss > self.mean + room

    def update(self, loss: float, config: GuardConfig) -> None:
        self.num_steps += 1
        share = max(1 / self.num_steps, 1 / config.history_steps)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)

    def saved(self) -> dict[str, float]:
        return asdict(self)


def judge(
    offenders: Sequence[int], text_loss: float | None, history: LossHistory, config: GuardConfig
) -> Problem | None:
    """offenders: ranks with a loss that is not a number; text_loss: mean of the step, None without text targets."""
    if offenders:
        return Problem("loss is not a number", tuple(offenders))
    if text_loss is not None and history.is_spike(text_loss, config):
        return Problem(f"text loss jumped from {history.mean:.4f} to {text_loss:.4f}")
    return None
