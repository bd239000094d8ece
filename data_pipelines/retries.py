"""Trying again what failed on the way to a store."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from conf import UserError
from data_pipelines.stores import PermanentError, TransientError

FIRST_DELAY_S, MAX_DELAY_S = 0.2, 30.0
TELL_AFTER = 4
REMEDY = "start again when its store answers, or leave it out of the shard pattern"

log = logging.getLogger(__name__)
T = TypeVar("T")
_jitter = random.SystemRandom()
"""Apart from every seeded generator: how often a network failed must change no data."""


class UnreachableError(UserError):
    """A shard that cannot be read: it is missing, or the time for further tries is over."""


def with_retries(attempt: Callable[[], T], url: str, minutes: float, remedy: str = REMEDY) -> T:
    """What `attempt` returns, tried again after a TransientError for `minutes`.

    Raises UnreachableError; remedy: what it advises when the time is over, in words of the command that runs.
    """
    end = time.monotonic() + 60 * minutes
    delay, num_failed = FIRST_DELAY_S, 0
    while True:
        try:
            return attempt()
        except PermanentError as error:
            raise UnreachableError(
                f"the shard {url} cannot be read ({error}): restore it, or change the shard pattern"
            ) from error
        except TransientError as error:
            seconds_left = end - time.monotonic()
            if seconds_left <= 0:
                raise UnreachableError(
                    f"the shard {url} could not be read in {minutes:g} minutes ({error}): {remedy}"
                ) from error
            num_failed += 1
            if num_failed == TELL_AFTER:
                log.warning("%s: %s; trying again for %.1f minutes", url, error, seconds_left / 60)
        time.sleep(min(seconds_left, delay * _jitter.uniform(0.5, 1.0)))
        delay = min(2 * delay, MAX_DELAY_S)
