"""What a run writes down: metrics.jsonl, events.jsonl, the console, wandb."""

from __future__ import annotations

import errno
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config import MonitorConfig
from trainer.monitor import Monitor, read_metrics

OFF = MonitorConfig(wandb="disabled", log_every_steps=2, collapse_spread=0.1)


def record(monitor: Monitor, step: int, **values: Any) -> None:
    monitor.step(step, 10, {"loss/text": 1.5, "seconds/step": 0.25, "embedding_spread": 0.5, **values})


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_the_last_attempt_of_a_step_counts(tmp_path: Path) -> None:
    for attempt, steps in ((1, range(1, 6)), (2, range(4, 8))):
        monitor = Monitor(tmp_path, OFF, {}, attempt)
        for step in steps:
            record(monitor, step)
        monitor.close()
    assert [(line["step"], line["attempt"]) for line in read_metrics(tmp_path)] == [
        *((step, 1) for step in (1, 2, 3)),
        *((step, 2) for step in (4, 5, 6, 7)),
    ]


def test_a_line_cut_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    line = json.dumps({"attempt": 1, "step": 1})
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{line[:-5]}")
    assert len(read_metrics(tmp_path)) == 1


def test_a_new_attempt_writes_behind_a_cut_line(tmp_path: Path) -> None:
    """A killed attempt leaves half a line without an end; the next attempt's first line must survive it."""
    (tmp_path / "metrics.jsonl").write_text('{"attempt": 1, "step": 1}\n{"attempt": 1, "st')
    monitor = Monitor(tmp_path, OFF, {}, 2)
    record(monitor, 2)
    monitor.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_full_disk_costs_lines_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Monitor(tmp_path, OFF, {}, 1)
    record(monitor, 1)

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("os.write", refuse)
        full.setattr("os.open", refuse)
        for step in (2, 3):
            record(monitor, step)
            monitor.event("stop", step)
            monitor.validation(step, {"loss/text": 2.0})
    record(monitor, 4)
    monitor.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4]
    assert caplog.messages == [
        f"{tmp_path / name}: lines are lost (No space left on device)"
        for name in ("metrics.jsonl", "events.jsonl", "validation.jsonl")
    ]


def test_the_time_left_is_of_this_attempts_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor(tmp_path, OFF, {}, 2)
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    monitor.start(400, 1000, 1, "cpu")
    monkeypatch.setattr("time.monotonic", lambda: 1300.0)
    assert monitor.time_left(500, 1000) == "1 h 40 min"  # 100 steps took 20 minutes
    assert monitor.time_left(995, 1000) == "0 min"
    monitor.close()


def test_console_shows_every_nth_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, OFF, {}, 1)
    for step in (1, 2, 3, 4):
        record(monitor, step)
    assert capsys.readouterr().out.splitlines() == [
        f"step {step}/10  loss/text 1.5000  embedding_spread 0.5000  0.25 s, 0 min left" for step in (2, 4)
    ]
    assert len(read_metrics(tmp_path)) == 4


def test_a_console_that_is_gone_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor(tmp_path, OFF, {}, 1)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as gone:
        gone.setattr(sys, "stdout", SimpleNamespace(write=refuse, flush=refuse))
        for step in (2, 4):
            record(monitor, step)
    monitor.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4]


def test_one_alarm_per_collapse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """0.1 is the limit; only above 0.15 is a collapse over."""
    monitor = Monitor(tmp_path, OFF, {}, 1)
    with caplog.at_level(logging.WARNING):
        for step, spread in enumerate([0.5, 0.09, 0.01, 0.12, 0.09, 0.16, 0.12, 0.05], start=1):
            record(monitor, step, embedding_spread=spread)
    assert [(event["step"], event["event"]) for event in events(tmp_path)] == [
        (2, "collapse"),
        (6, "recovery"),
        (8, "collapse"),
    ]
    assert [("collapse alarm" in message) for message in caplog.messages] == [True, False, True]
    assert events(tmp_path)[0]["embedding_spread"] == 0.09


def test_steps_without_images_neither_alarm_nor_end_one(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, OFF, {}, 1)
    record(monitor, 1, embedding_spread=0.01)
    monitor.step(2, 10, {"loss/text": 1.5, "seconds/step": 0.25})
    record(monitor, 3, embedding_spread=0.01)
    assert [event["step"] for event in events(tmp_path)] == [1]


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Settings=dict, **functions))


def fail(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route to wandb")


def test_wandb_that_cannot_start_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, init=fail)
    monitor = Monitor(tmp_path, MonitorConfig(log_every_steps=1), {}, 1)
    record(monitor, 1)
    monitor.close()
    assert "wandb is off for this attempt (no route to wandb)" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


def test_wandb_that_fails_later_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, init=lambda **_: SimpleNamespace(log=fail, finish=fail))
    monitor = Monitor(tmp_path, MonitorConfig(log_every_steps=1), {}, 1)
    for step in (1, 2):
        record(monitor, step)
    monitor.close()
    assert caplog.text.count("wandb is off from here on (no route to wandb)") == 1
    assert len(read_metrics(tmp_path)) == 2


def test_wandb_keeps_its_id_over_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    logged: list[tuple[int, list[str]]] = []

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(settings)
        return SimpleNamespace(log=lambda values, step: logged.append((step, list(values))), finish=lambda: None)

    fake_wandb(monkeypatch, init=init)
    for attempt in (1, 2):
        monitor = Monitor(tmp_path, MonitorConfig(log_every_steps=2), {"seed": 1}, attempt)
        record(monitor, 1)
        record(monitor, 2, embedding_std_per_slot=[0.1])
        monitor.close()
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["mode"] == "offline"
    assert logged == [(2, ["loss/text", "seconds/step", "embedding_spread"])] * 2  # no lists, every second step
