"""Schedules against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from models.config import ObjectiveConfig
from trainer.config import OptimConfig
from trainer.schedule import image_weight, lr_factor

PAPER = OptimConfig()  # warm-up over a fifth of the steps, cosine to 0


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / 20),
        (9, 0.5),
        (19, 1.0),  # the 20 steps of the warm-up end at the peak
        (20, 1.0),
        (40, (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (60, 0.5),
        (99, (1 + math.cos(math.pi * 79 / 80)) / 2),
        (100, 0.0),
    ],
)
def test_paper_schedule_over_100_steps(step: int, factor: float) -> None:
    assert lr_factor(step, 100, PAPER) == pytest.approx(factor, abs=1e-12)


def test_the_cosine_ends_at_min_lr_ratio() -> None:
    optim = OptimConfig(min_lr_ratio=0.1)
    assert lr_factor(60, 100, optim) == pytest.approx(0.55)
    assert lr_factor(100, 100, optim) == lr_factor(150, 100, optim) == pytest.approx(0.1)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert lr_factor(0, 100, OptimConfig(warmup_ratio=0.0)) == 1.0


def test_all_warmup_never_falls() -> None:
    assert [lr_factor(step, 4, OptimConfig(warmup_ratio=1.0)) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_constant_has_neither_warmup_nor_decay() -> None:
    assert {lr_factor(step, 100, OptimConfig(schedule="constant")) for step in range(101)} == {1.0}


def test_image_weight_waits_and_then_rises() -> None:
    objective = ObjectiveConfig(image_weight=2.0, image_weight_delay_steps=3, image_weight_warmup_steps=3)
    weights = [image_weight(step, objective) for step in range(8)]
    assert weights == pytest.approx([0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0])


def test_image_weight_of_the_paper_is_whole_from_the_start() -> None:
    assert image_weight(0, ObjectiveConfig()) == 1.0
