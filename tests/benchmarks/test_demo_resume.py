"""Whether the demo's claim of an exact resume is found out when it is false."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo.resume import RepeatedStep, ResumeCheck, check_resume


def line(attempt: int, step: int, **changes: Any) -> dict[str, Any]:
    values = {
        "loss/text": 1 / (step + 2),
        "grad_norm": float("nan"),
        "digest": 1000 + step,
        "seconds/step": attempt,
        "time": attempt,
    }
    return {"attempt": attempt, "step": step, **values, **changes}


def run(folder: Path, second: list[dict[str, Any]], weights: bytes = b"weights") -> ResumeCheck:
    """Attempt 1 trains steps 1 to 4, the checkpoint is of step 2; then `second`."""
    lines = [line(1, step) for step in range(1, 5)] + second
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    for name, content in (("first", b"weights"), ("second", weights)):
        (folder / name).mkdir()
        (folder / name / "fragments-00000.safetensors").write_bytes(content)
    return check_resume(folder / "metrics.jsonl", folder / "first", folder / "second", resumed_from=2, stop=4)


def test_equal_attempts_are_exact(tmp_path: Path) -> None:
    checked = run(tmp_path, [line(2, step) for step in range(3, 7)])
    assert checked.exact
    assert [step.step for step in checked.steps] == [3, 4]
    assert checked.to_json()["exact"] is True


@pytest.mark.parametrize("change", [{"loss/text": 1 / 6 + 2**-54}, {"digest": 7}, {"extra": 0}])
def test_the_smallest_difference_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    checked = run(tmp_path, [line(2, 3), line(2, 4, **change)])
    assert not checked.exact
    assert [step.differences for step in checked.steps] == [[], list(change)]


def test_a_step_that_was_not_repeated_is_not_exact(tmp_path: Path) -> None:
    assert not run(tmp_path, [line(2, 3)]).exact


def test_every_attempt_counts_and_a_line_cut_by_a_kill_does_not(tmp_path: Path) -> None:
    again = [line(2, 3), *(line(4, step) for step in (3, 4))]
    assert run(tmp_path, again).exact
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"attempt": 5, "st')
    assert check_resume(metrics, tmp_path / "first", tmp_path / "second", 2, 4).exact
    metrics.write_text(metrics.read_text() + "\n" + json.dumps(line(6, 3, digest=0)) + "\n")
    assert not check_resume(metrics, tmp_path / "first", tmp_path / "second", 2, 4).exact


def test_other_weights_are_not_exact(tmp_path: Path) -> None:
    checked = run(tmp_path, [line(2, step) for step in (3, 4)], weights=b"weighty")
    assert not checked.exact
    assert checked.fragment_files == {"fragments-00000.safetensors": False}


def test_nothing_compared_is_not_exact() -> None:
    assert not ResumeCheck(2, [], {"fragments-00000.safetensors": True}).exact
    assert not ResumeCheck(2, [RepeatedStep(3, 0.5, {1: 7, 2: 7}, [])], {}).exact
