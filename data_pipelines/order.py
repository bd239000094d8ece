"""The order of samples, computed: keyed hashes and permutations, units of an index, random numbers of a sample.

Everything here is a pure function of integers and strings, the same on every platform and for ever: a change of any
value changes the data order of every run.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_pipelines.document import SampleKey
from data_pipelines.index import Index

MASK64 = (1 << 64) - 1
FEISTEL_ROUNDS = 8
MIN_UNITS_PER_LANE = 8

Part = str | int


def stable_hash(*parts: Part, bits: int = 64) -> int:
    """Uniform integer of `bits` bits. JSON keeps ("a", "b") and ("ab",) apart and escapes names that are no UTF-8."""
    text = json.dumps(parts).encode("ascii")
    return int.from_bytes(hashlib.blake2b(text, digest_size=bits // 8).digest(), "big")


@lru_cache(maxsize=4096)
def _round_keys(key: tuple[Part, ...]) -> tuple[int, ...]:
    return tuple(stable_hash("feistel", round_number, *key) for round_number in range(FEISTEL_ROUNDS))


def permute(key: tuple[Part, ...], n: int, i: int) -> int:
    """Image of i under the permutation of range(n) that `key` chooses, in O(1) time and memory.

    Balanced Feistel network over the smallest 4^h >= n, applied again while its result is outside range(n) (cycle
    walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): fewer than 4 applications on average.
    """
    assert 0 <= i < n
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    round_keys = _round_keys(key)
    while True:
        left, right = i >> half_bits, i & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & half_mask)
        i = left << half_bits | right
        if i < n:
            return i


def _mix(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31


class Unit(NamedTuple):
    """Samples [first, last) of a chunk, as it comes in one epoch."""

    epoch: int
    chunk: int
    first: int
    last: int


class Units:
    """The endless sequence q = 0, 1, 2, ... of a source's units.

    A unit is a chunk, or a slice of one (down to one sample) when there are fewer than 8 chunks per lane. Within each
    epoch of `num_units` units every sample comes exactly once.
    """

    def __init__(self, index: Index, source: str, seed: int, lanes: int) -> None:
        self._index, self._key = index, ("units", seed, source)
        slices = -(-MIN_UNITS_PER_LANE * lanes // index.num_chunks)
        self._slices = min(slices, index.max_chunk_samples)
        self.num_units = index.num_chunks * self._slices

    def unit(self, q: int) -> Unit:
        epoch, i = divmod(q, self.num_units)
        chunk, piece = divmod(permute((*self._key, epoch), self.num_units, i), self._slices)
        num_samples = self._index.chunk(chunk).num_samples
        return Unit(epoch, chunk, piece * num_samples // self._slices, (piece + 1) * num_samples // self._slices)


class SampleRandom:
    """All the randomness of one sample in one epoch, wherever and whenever it is read: Philox keyed by its place."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def of(self, epoch: int, key: SampleKey) -> np.random.Generator:
        """The one generator, set anew (making one takes three times as long): good until the next call."""
        high, low = divmod(stable_hash("sample", self._seed, epoch, *key, bits=128), 1 << 64)
        self._state["state"]["key"][:] = low, high
        self._philox.state = self._state
        return self._generator


def is_held_out(source: str, name: str, share: float) -> bool:
    """Whether a sample is kept for validation: by a hash of its webdataset key, whatever the seed and the shards."""
    return share > 0 and stable_hash("holdout", source, name) < share * 2.0**64
