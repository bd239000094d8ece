from __future__ import annotations

import itertools
from collections import deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.mixture import GOLDEN_RATIO_CONJUGATE, Mixture, TokenShare
from data_pipelines.order import MASK64


def shares(mixture: Mixture, num_sources: int, choices: list[int]) -> np.ndarray:
    return np.bincount(choices, minlength=num_sources) / len(choices)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.05, 100), min_size=1, max_size=6),
    st.integers(0, 10),
    st.integers(0, 1000),
)
def test_windows_realise_the_weights(weights: list[float], lane: int, window: int) -> None:
    """5 windows of 600 documents, about a thousand rows: within 1 % of all documents; a single one within 2 %."""
    mixture = Mixture(weights, seed=3)
    expected = np.array(weights) / sum(weights)
    windows = [[mixture.source(lane, w, n) for n in range(600)] for w in range(window, window + 5)]
    together = [choice for choices in windows for choice in choices]
    assert np.abs(shares(mixture, len(weights), together) - expected).max() < 0.01
    assert np.abs(shares(mixture, len(weights), windows[0]) - expected).max() < 0.02


def test_phases_differ_between_lanes_and_windows_and_even_out() -> None:
    """One document a window, as with very long documents: the phases alone realise the weights (4 sigma = 2.5 %)."""
    mixture = Mixture([1, 3], seed=0)
    choices = [mixture.source(lane, window, 0) for lane in range(70) for window in range(70)]
    assert abs(np.mean(choices) - 0.75) < 0.025


def test_a_source_without_weight_never_comes() -> None:
    choices = [Mixture([0, 1, 0], seed=0).source(0, 0, n) for n in range(1000)]
    assert set(choices) == {1}


def taken(share: TokenShare, lengths: list[int]) -> int:
    """Tokens of the documents up to the first that is not taken."""
    return sum(itertools.takewhile(share.take, lengths))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1), st.floats(0, 0.999))
def test_a_share_of_tokens_is_expected_exactly(lengths: list[int], part: float) -> None:
    """Over all phases, here 2^54 apart: to a thousandth of a document."""
    size = 1 + int(part * sum(lengths) * 2**64)
    results = [taken(TokenShare(size, phase << 54), lengths) for phase in range(1024)]
    assert abs(sum(results) / 1024 - size / 2**64) <= max(lengths) / 1000
    assert max(abs(result - size / 2**64) for result in results) <= max(lengths)


def test_shares_of_tokens_follow_the_weights_over_windows() -> None:
    """What a window leaves begins the next one; documents of source 0 are longer than its share of a window."""
    weights, mean_lengths, windows, window_tokens = [1, 3, 6], [700, 3, 90], 200, 4000
    mixture, rng = Mixture(weights, seed=1), np.random.default_rng(0)
    lengths = [deque(rng.integers(1, 2 * mean, windows * window_tokens // mean).tolist()) for mean in mean_lengths]
    counts = np.zeros(3)
    for window, source in itertools.product(range(windows), range(3)):
        share = mixture.token_share(5, window, source, window_tokens)
        while share.take(lengths[source][0]):
            counts[source] += lengths[source].popleft()
    assert np.abs(counts / (windows * window_tokens) - np.array(weights) / 10).max() < 0.01


def test_documents_within_what_is_left_are_sure_to_be_taken() -> None:
    share = TokenShare(size=100 << 64, phase=MASK64)
    assert [share.take(60), share.num_left, share.take(41), share.take(40), share.num_left] == [
        True,
        40,
        False,
        True,
        0,
    ]
    assert not share.take(1)
    assert share.fraction == 1.0


def test_golden_ratio() -> None:
    assert abs(GOLDEN_RATIO_CONJUGATE / 2**64 - (5**0.5 - 1) / 2) < 1e-15
