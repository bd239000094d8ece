"""What the chaos tests do not reach: the watchdog at rest, on a full disk, and over several attempts."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.conftest import full_disk
from trainer import watchdog
from trainer.phases import Phases
from trainer.stop import START_AGAIN
from trainer.topology import Topology
from trainer.watchdog import Watchdog


class EndedError(Exception):
    pass


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes with which the process would have ended."""
    codes = list[int]()

    def end(code: int) -> None:
        codes.append(code)
        raise EndedError

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watchdog, "GATHER_S", 0.0)
    return codes


def make(tmp_path: Path, attempt: int = 1, limit_s: float = 60.0) -> Watchdog:
    return Watchdog(tmp_path, tmp_path / "hang" / f"attempt-{attempt}", Topology(), Phases(), limit_s)


def test_a_full_disk_does_not_keep_it_from_ending_the_run(tmp_path: Path, ends: list[int]) -> None:
    dog = make(tmp_path)
    with full_disk(0), pytest.raises(EndedError):
        dog._end()
    assert ends == [START_AGAIN]


def test_the_next_attempt_leaves_the_reports(tmp_path: Path, ends: list[int]) -> None:
    with pytest.raises(EndedError):
        make(tmp_path)._end()
    with make(tmp_path, attempt=2) as dog:
        dog.beat()
    assert [path.name for path in (tmp_path / "hang").iterdir()] == ["attempt-1"]
    assert (tmp_path / "hang" / "attempt-1" / "rank-00000.json").is_file() and ends == [START_AGAIN]


def test_it_rests_until_the_next_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = list[float]()
    monkeypatch.setattr(Watchdog, "_end", lambda self: ended.append(time.monotonic()) or self._stopped.set())
    with make(tmp_path, limit_s=0.3) as dog:
        dog.beat()
        dog.rest()
        time.sleep(0.8)
        assert not ended
        dog.beat()
        time.sleep(0.8)
        assert ended


def test_nothing_is_left_where_nothing_happened(tmp_path: Path) -> None:
    with make(tmp_path) as dog:
        dog.beat()
    assert not (tmp_path / "hang").exists()
