"""The checkpoint benchmark in small: it runs through and says what it found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import checkpoint
from tests.benchmarks.test_step import MODEL, ROWS, out  # noqa: F401 # a fixture

pytestmark = pytest.mark.slow


def test_it_runs_through(
    out: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EMU_DATA", "")
    checkpoint.run(out, checkpoint.Sizes(turns=1, steps=1, model=(*MODEL, *ROWS, "monitor.log_every_steps=1")))
    lines = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"ratios: stall=-?\d+\.\d\d monitoring=\d\.\d{4}", lines[-1])
    assert not (out / "run" / "checkpoints").exists()


def test_the_stall_is_what_the_steps_lose() -> None:
    assert checkpoint.Turn(blocking=10.0, blocked=1.0, lost=1.5, steps_meanwhile=4).stall == 0.25
