from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from conf import UserError
from data_pipelines import retries
from data_pipelines.retries import UnreachableError, with_retries
from data_pipelines.stores import PermanentError, TransientError


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of each pause, on a clock that only pauses move."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(pauses))
    return pauses


def failing(times: int, error: type[Exception]) -> Callable[[], str]:
    left = iter([True] * times)

    def attempt() -> str:
        if next(left, False):
            raise error("503 busy")
        return "data"

    return attempt


def test_pauses_grow_and_touch_no_seeded_generator(slept: list[float]) -> None:
    random.seed(1)
    state = random.getstate()
    assert with_retries(failing(6, TransientError), "url", 10) == "data"
    assert random.getstate() == state
    assert len(slept) == 6
    for number, pause in enumerate(slept):
        assert 0.5 <= pause / (retries.FIRST_DELAY_S * 2**number) <= 1


def test_after_the_time_it_stops_and_says_why(slept: list[float]) -> None:
    with pytest.raises(UnreachableError, match=r"^the shard url could not be read in 2 minutes \(503 busy\): [^\n]+$"):
        with_retries(failing(10**6, TransientError), "url", 2)
    assert sum(slept) == pytest.approx(120)
    assert max(slept) <= retries.MAX_DELAY_S


@pytest.mark.parametrize(("error", "minutes"), [(PermanentError, 10), (TransientError, 0)])
def test_no_second_try(slept: list[float], error: type[Exception], minutes: float) -> None:
    with pytest.raises(UserError, match="503 busy"):
        with_retries(failing(1, error), "url", minutes)
    assert slept == []
