"""After several steps in a row that had to be thrown away: earlier weights, and the data since passed over."""

from __future__ import annotations

from pathlib import Path

from deepspeed import DeepSpeedEngine

from conf import UserError
from trainer.checkpoint import load_checkpoint
from trainer.config import PretrainConfig
from trainer.diagnostics import TargetVariance
from trainer.guards import LossHistory
from trainer.state import TrainState, find_newest
from trainer.topology import Topology

RECENT_STEPS = 100
"""Rollbacks of longer ago are forgotten."""


def roll_back(config: PretrainConfig, engine: DeepSpeedEngine, state: TrainState, topology: Topology) -> int:
    """Weights, optimizer and loss statistics of the newest checkpoint before the bad steps; returns its step.

    The steps go on counting and the lanes go on reading where they are: what was trained since that checkpoint is
    undone, and its data are not read again. Collective; no checkpoint may be in flight. UserError on every rank if
    there is no such checkpoint, or this has not helped before.
    """
    run_dir, first_bad = Path(config.run_dir), state.step - state.bad_steps + 1
    advice = "look at events.jsonl, lower optim.*_lr or optim.grad_clip, and start again from an earlier checkpoint"
    recent = [step for step in state.rollbacks if step > state.step - RECENT_STEPS]
    if len(recent) >= config.guard.max_rollbacks:
        raise UserError(
            f"steps {first_bad} to {state.step} were no good, and the rollbacks that guard.max_rollbacks="
            f"{config.guard.max_rollbacks} allows within {RECENT_STEPS} steps are used up: {advice}"
        )
    path = find_newest(run_dir, topology, before=first_bad)
    if path is None:
        raise UserError(
            f"steps {first_bad} to {state.step} were no good and there is no checkpoint from before them: {advice}"
        )
    saved = load_checkpoint(path, engine, topology)
    state.variance = TargetVariance(saved.state["target_variance"])
    state.history = LossHistory(**saved.state["loss_history"])
    state.bad_steps = 0
    state.rollbacks = [*recent, state.step]
    return saved.step
