"""Saving in the background: what is stored, and what happens when a save fails."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from conf import UserError
from models.weights import tensor_files
from models.weights.fragment_files import read_weights
from tests.trainer.test_checkpoint import ALONE, make_engine
from trainer import saving
from trainer.checkpoint_folder import find_latest
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import CheckpointConfig
from trainer.saving import RETRY_STEPS, Saver


class Disk:
    """Writes go through it: it can be slow, and it can be full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full, self.may_write = False, threading.Event()
        self.may_write.set()
        self._write = tensor_files._write
        monkeypatch.setattr(tensor_files, "_write", self.write)

    def write(self, *args: Any) -> None:
        assert self.may_write.wait(timeout=60)
        if self.is_full:
            raise OSError(28, "No space left on device")
        self._write(*args)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(saving, "LAST_PAUSE_S", 0.0)
    return Disk(monkeypatch)


def make_saver(run: Path, engine: Any, **settings: Any) -> tuple[Saver, CheckpointWriter, list[tuple[int, str]]]:
    """Saving every 10 steps; `engine.step` is what a checkpoint is made of. The list is of failures."""
    writer, failures = CheckpointWriter(run, ALONE), []
    config = CheckpointConfig(every_steps=10, keep=2, **settings)

    def begin(permanent: bool) -> None:
        writer.start(engine, engine.step, {}, {}, permanent)

    def tell(kind: str, step: int, **facts: str) -> None:
        if kind == "checkpoint_failed":
            failures.append((step, facts["reason"]))

    engine.step = 0
    return Saver(run, config, ALONE, writer, begin, tell, step=0), writer, failures


def run_to(saver: Saver, writer: CheckpointWriter, engine: Any, step: int) -> None:
    while engine.step < step:
        engine.step += 1
        saver.after_step(engine.step)
        while writer.is_writing:
            pass
        saver.poll(writer.is_writing)


def test_what_is_stored_is_what_was_there_when_the_save_began(tmp_path: Path, disk: Disk) -> None:
    engine = make_engine(seed=1, num_steps=3)
    expected = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    writer = CheckpointWriter(tmp_path, ALONE)
    disk.may_write.clear()
    writer.start(engine, 5, {}, {})
    with torch.no_grad():
        for parameter in engine.module.parameters():  # training goes on
            parameter.zero_()
    assert writer.is_writing and find_latest(tmp_path) is None
    disk.may_write.set()
    path = writer.finish()
    assert find_latest(tmp_path) == path and not writer.in_flight
    stored = dict(read_weights(path))
    assert all(torch.equal(stored[name], value) for name, value in expected.items())
    writer.start(engine, 6, {}, {})  # the buffers are used again
    assert not any(value.any() for _, value in read_weights(writer.finish()))


def test_a_run_saves_at_its_intervals_and_at_its_end(tmp_path: Path, disk: Disk) -> None:
    engine = make_engine(num_steps=1)
    saver, writer, failures = make_saver(tmp_path, engine)
    run_to(saver, writer, engine, 33)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000020", "step-00000030"]
    saver.last(33)
    latest = find_latest(tmp_path)
    assert latest is not None and latest.name == "step-00000033" and not failures
    saver.last(33)  # nothing new to save
    assert find_latest(tmp_path) == latest


def test_a_full_disk_costs_neither_the_run_nor_what_was_saved(tmp_path: Path, disk: Disk) -> None:
    engine = make_engine(num_steps=1)
    saver, writer, failures = make_saver(tmp_path, engine)
    run_to(saver, writer, engine, 19)
    saved = find_latest(tmp_path)
    disk.is_full = True
    run_to(saver, writer, engine, 20 + RETRY_STEPS - 1)
    assert [step for step, _ in failures] == [20, 30]
    assert all("No space left on device" in sentence for _, sentence in failures)
    assert find_latest(tmp_path) == saved
    disk.is_full = False
    run_to(saver, writer, engine, 20 + RETRY_STEPS + 1)
    latest = find_latest(tmp_path)
    assert latest is not None and latest.name == f"step-{20 + RETRY_STEPS:08d}"


def test_a_failed_save_is_tried_again_between_the_intervals(tmp_path: Path, disk: Disk) -> None:
    engine = make_engine(num_steps=1)
    saver, writer, failures = make_saver(tmp_path, engine)
    saver._config.every_steps = 100
    disk.is_full = True
    run_to(saver, writer, engine, 100)
    disk.is_full = False
    run_to(saver, writer, engine, 100 + RETRY_STEPS)
    latest = find_latest(tmp_path)
    assert latest is not None and latest.name == f"step-{100 + RETRY_STEPS:08d}" and len(failures) == 1


def test_a_failure_that_shows_late_is_mended_at_once(tmp_path: Path, disk: Disk) -> None:
    """The file is full after more steps than a retry waits for."""
    engine = make_engine(num_steps=1)
    saver, writer, failures = make_saver(tmp_path, engine)
    saver._config.every_steps = 100
    run_to(saver, writer, engine, 99)
    disk.is_full = True
    disk.may_write.clear()
    for engine.step in range(100, 100 + 2 * RETRY_STEPS):
        saver.after_step(engine.step)
    disk.may_write.set()
    while writer.is_writing:
        pass
    saver.poll(writer.is_writing)
    assert len(failures) == 1
    disk.is_full = False
    run_to(saver, writer, engine, 100 + 2 * RETRY_STEPS)
    latest = find_latest(tmp_path)
    assert latest is not None and latest.name == f"step-{100 + 2 * RETRY_STEPS:08d}"


def test_the_retry_of_a_permanent_one_is_permanent(tmp_path: Path, disk: Disk) -> None:
    engine = make_engine(num_steps=1)
    saver, writer, _ = make_saver(tmp_path, engine, permanent_every_steps=20)
    run_to(saver, writer, engine, 19)
    disk.is_full = True
    run_to(saver, writer, engine, 20)
    disk.is_full = False
    run_to(saver, writer, engine, 75)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}" for step in (30, 40, 50, 60, 70)]  # 30 for 20, and 50 and 70 are rolling


def test_no_checkpoint_of_bad_steps(tmp_path: Path, disk: Disk) -> None:
    """It would take the place of the one that a rollback needs; it comes with the next good step."""
    engine = make_engine(num_steps=1)
    saver, writer, _ = make_saver(tmp_path, engine)
    run_to(saver, writer, engine, 9)
    for engine.step in (10, 11, 12):
        saver.after_step(engine.step, is_good=False)
    assert not writer.in_flight
    run_to(saver, writer, engine, 14)
    latest = find_latest(tmp_path)
    assert latest is not None and latest.name == "step-00000013"


def test_the_last_save_is_tried_several_times_and_then_ends_the_run(tmp_path: Path, disk: Disk) -> None:
    engine = make_engine(num_steps=1)
    saver, writer, failures = make_saver(tmp_path, engine)
    run_to(saver, writer, engine, 12)
    saved = find_latest(tmp_path)
    disk.is_full = True
    with pytest.raises(UserError, match=r"step-00000012 was not written \(rank 0: .*No space left on device"):
        saver.last(12)
    assert len(failures) == saving.LAST_TRIES - 1
    assert find_latest(tmp_path) == saved


def test_in_the_foreground_the_step_waits(tmp_path: Path, disk: Disk) -> None:
    engine = make_engine(num_steps=1)
    saver, writer, _ = make_saver(tmp_path, engine, background=False)
    saver.after_step(10)
    assert not writer.in_flight and find_latest(tmp_path) is not None
