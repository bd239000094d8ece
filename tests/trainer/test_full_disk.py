"""A full disk at any moment of a save: the newest good checkpoint stays, the run goes on, and saves when it can."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.weights import tensor_files
from tests.trainer.test_checkpoint import ALONE, make_engine
from tests.trainer.test_saving import make_saver, run_to
from trainer import saving
from trainer.checkpoint import load_checkpoint
from trainer.checkpoint_folder import find_damage, find_latest
from trainer.config import MonitorConfig
from trainer.monitor import Monitor, read_metrics

ENOSPC = 28
RETRY_STEPS = 3


class FullDisk:
    """Calls that change the disk, counted; from call `full_from` on they fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.full_from = 0, 10**9
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))
        monkeypatch.setattr(tensor_files, "_write", self.failing(tensor_files._write))

    def failing(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls > self.full_from:
                raise OSError(ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return call


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RETRY_STEPS", RETRY_STEPS)
    monkeypatch.setattr(saving, "LAST_PAUSE_S", 0.0)


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, full_from = FullDisk(monkeypatch), 0
    while True:
        run, engine = tmp_path / str(full_from), make_engine(num_steps=1)
        disk.full_from = 10**9
        saver, writer, failures = make_saver(run, engine)
        run_to(saver, writer, engine, 11)
        first = find_latest(run)
        assert first is not None
        disk.calls, disk.full_from = 0, full_from
        run_to(saver, writer, engine, 21)
        newest = find_latest(run)
        assert newest is not None and newest.name in ("step-00000010", "step-00000020")
        assert all(find_damage(path) is None for path in (run / "checkpoints").glob("step-*") if not path.suffix)
        if not failures:
            assert newest.name == "step-00000020"
            break
        assert all(step == 20 and "No space left on device" in sentence for step, sentence in failures)
        disk.full_from = 10**9
        run_to(saver, writer, engine, 25)
        saver.last(25)
        latest = find_latest(run)
        assert latest is not None and latest.name == "step-00000025"
        load_checkpoint(latest, make_engine(), ALONE)
        full_from += 1
    assert full_from > 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "emu-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_without_room(small_disk: Path) -> None:
    engine = make_engine(num_steps=1)
    saver, writer, failures = make_saver(small_disk / "run", engine)
    run_to(saver, writer, engine, 11)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    run_to(saver, writer, engine, 22)
    assert [step for step, _ in failures] == [20]
    latest = find_latest(small_disk / "run")
    assert latest is not None and latest.name == "step-00000010"
    filler.unlink()
    run_to(saver, writer, engine, 24)
    latest = find_latest(small_disk / "run")
    assert latest is not None and latest.name == "step-00000023"


def test_a_record_that_finds_no_room_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines around it stay readable, and the loss is told once."""
    monitor = Monitor(tmp_path, MonitorConfig(wandb="disabled", log_every_steps=10), {}, attempt=1)
    write, full = os.write, {"now": False}

    def limited(descriptor: int, content: bytes) -> int:
        if full["now"]:
            write(descriptor, content[: len(content) // 2])
            raise OSError(ENOSPC, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", limited)
    for step in range(1, 7):
        full["now"] = step in (3, 4)
        monitor.step(step, 9, {"loss/text": float(step)})
    monitor.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 5, 6]
