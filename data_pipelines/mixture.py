"""What each source gives to a window: the weights realised in documents or in tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from data_pipelines.order import MASK64, stable_hash

GOLDEN_RATIO_CONJUGATE = 0x9E3779B97F4A7C15
"""(sqrt(5) - 1) / 2 as a fraction of 2^64."""


class Mixture:
    """Document n of a window takes the source where the weights' distribution passes frac(phase + n * golden ratio).

    The points of that sequence cover [0, 1) more evenly than random ones: after n documents each source is O(log n)
    documents from its share. The phase depends on lane and window, so that the rounding evens out over windows.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.weights = tuple(weights)
        shares = [Fraction(weight) for weight in weights]
        self._shares = [share / sum(shares) for share in shares]
        self._thresholds = [int(cumulated * 2**64) for cumulated in accumulate(self._shares)]
        self._seed = seed

    def source(self, lane: int, window: int, n: int) -> int:
        """Number of the source of document n of a lane's window. Exact integer arithmetic: no platform differs."""
        return bisect_right(self._thresholds, (_phase(self._seed, lane, window) + n * GOLDEN_RATIO_CONJUGATE) & MASK64)

    def token_share(self, lane: int, window: int, source: int, window_tokens: int) -> TokenShare:
        """What source number `source` may give to a window of `window_tokens` tokens."""
        phase = stable_hash("token mixture", self._seed, lane, window, source)
        return TokenShare(int(self._shares[source] * window_tokens * 2**64), phase)


@lru_cache(maxsize=1024)
def _phase(seed: int, lane: int, window: int) -> int:
    return stable_hash("mixture", seed, lane, window)


class TokenShare:
    """Tokens that a source may give to one window: its next documents as long as `take` takes them.

    The document that crosses the end is taken with probability (its tokens before the end) / (all its tokens), else it
    is the first of the next window. Whatever the lengths, the tokens expected are therefore exactly the share: windows
    deviate by less than a document and evenly to both sides, so nothing has to be carried over.

    size, phase: in units of 2^-64 tokens and of 2^-64; integers, so that no platform differs.
    """

    def __init__(self, size: int, phase: int) -> None:
        self._size, self._phase = size, phase
        self._num_taken = 0

    def take(self, num_tokens: int) -> bool:
        """Whether the next document, of so many tokens, belongs to the window; the first that does not is the end."""
        if (self._num_taken << 64) + self._phase * num_tokens >= self._size:
            return False
        self._num_taken += num_tokens
        return True

    @property
    def num_left(self) -> int:
        """Whole tokens before the end: a document of no more is sure to be taken."""
        return max(0, (self._size >> 64) - self._num_taken)

    @property
    def fraction(self) -> float:
        """How full the share is; a little over 1 after a document that crosses the end."""
        return (self._num_taken << 64) / self._size
