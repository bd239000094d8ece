"""What is no honest step: a loss or gradient that is not a number, or a loss that jumps. All ranks judge the same sums."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from trainer.config import GuardConfig


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
        room = max(config.spike_deviations * math.sqrt(self.variance), config.spike_least * abs(self.mean))
        return loss > self.mean + room

    def update(self, loss: float, config: GuardConfig) -> None:
        self.num_steps += 1
        share = max(1 / self.num_steps, 1 / config.history_steps)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)

    def saved(self) -> dict[str, float]:
        return asdict(self)
