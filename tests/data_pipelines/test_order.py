from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.document import SampleKey
from data_pipelines.index_builder import build_index
from data_pipelines.order import SampleRandom, Units, is_held_out, permute, stable_hash
from tests.data_pipelines.corpora import write_texts

KEYS = st.tuples(st.text(max_size=5), st.integers(0, 2**40))


@settings(max_examples=80, deadline=None)
@given(KEYS, st.integers(1, 300))
def test_permute_is_a_permutation(key: tuple[str, int], n: int) -> None:
    assert sorted(permute(key, n, i) for i in range(n)) == list(range(n))


def test_permutations_of_different_keys_look_independent() -> None:
    """Each pair (i, image) of n = 16 comes 4000 / 16 = 250 times: chi-squared of 225 degrees of freedom, p = 1e-6."""
    counts = np.zeros((16, 16))
    for key in range(4000):
        for i in range(16):
            counts[i, permute(("test", key), 16, i)] += 1
    assert ((counts - 250) ** 2 / 250).sum() < 337


def test_large_permutations_cost_nothing() -> None:
    n = 10**12 + 7
    images = [permute(("big",), n, i) for i in range(1000)]
    assert len(set(images)) == 1000
    assert max(images) < n and 0.45 < np.mean(images) / n < 0.55


PINNED = "2404733386618968381 [2, 8, 4, 1, 5, 6, 7, 9, 3, 0] [78, 74, 82, 3, 33] [1, 0, 2, 0, 0, 2, 0, 2, 1, 0, 2, 0]\n"


def test_values_are_the_same_for_ever() -> None:
    """A change here changes the data order of every run that can be resumed."""
    key = SampleKey("laion", 3, 14)
    program = (
        "from data_pipelines.order import *; from data_pipelines.mixture import Mixture\n"
        "print(stable_hash('a', 1), [permute(('k', 0, 'laion'), 10, i) for i in range(10)],"
        "SampleRandom(1).of(2, SampleKey('laion', 3, 14)).integers(0, 100, 5).tolist(),"
        "[Mixture([3, 1, 2.5], 0).source(5, 6, n) for n in range(12)])"
    )
    fixed_hashes = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    assert fixed_hashes.stdout == PINNED
    random = SampleRandom(1)
    first = random.of(2, key).integers(0, 100, 5).tolist()
    assert first != random.of(3, key).integers(0, 100, 5).tolist()
    assert first == random.of(2, key).integers(0, 100, 5).tolist()


@pytest.mark.parametrize(("lanes", "num_units"), [(1, 12), (2, 18), (4, 36), (100, 42)])
def test_every_epoch_has_every_sample_once(tmp_path: Path, lanes: int, num_units: int) -> None:
    """40 samples in 6 chunks of 7, 7, 6 + 7, 7, 6: units go down to single samples as lanes grow."""
    for shard in range(2):
        write_texts(tmp_path / f"{shard}.tar", 0, 20)
    index = build_index("x", f"{tmp_path}/*.tar", tmp_path / "index", chunk_samples=7)
    units = Units(index, "x", seed=5, lanes=lanes)
    assert units.num_units == num_units
    orders = []
    for epoch in range(3):
        samples: list[tuple[int, int]] = []
        for q in range(epoch * units.num_units, (epoch + 1) * units.num_units):
            unit = units.unit(q)
            assert unit.epoch == epoch
            samples.extend((unit.chunk, i) for i in range(unit.first, unit.last))
        assert Counter(samples) == Counter((c, i) for c in range(6) for i in range(index.chunk(c).num_samples))
        orders.append(samples)
    assert orders[0] != orders[1] != orders[2]


def test_units_depend_on_seed_and_source(tmp_path: Path) -> None:
    index = build_index("x", str(write_texts(tmp_path / "0.tar", 0, 40)), tmp_path / "index", chunk_samples=2)
    orders = [
        [Units(index, source, seed, 1).unit(q) for q in range(20)] for source, seed in (("a", 0), ("a", 1), ("b", 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_holdout_is_a_share_by_name() -> None:
    names = [f"{i:09d}" for i in range(20_000)]
    held_out = {name for name in names if is_held_out("laion", name, 0.1)}
    assert abs(len(held_out) - 2000) < 6 * np.sqrt(20_000 * 0.09)
    assert held_out > {name for name in names if is_held_out("laion", name, 0.05)}
    assert held_out != {name for name in names if is_held_out("other", name, 0.1)}
    assert not any(is_held_out("laion", name, 0.0) for name in names)
    assert all(is_held_out("laion", name, 1.0) for name in names)


def test_names_that_are_no_utf8_can_be_hashed() -> None:
    assert stable_hash("\udcff.jpg") != stable_hash("\udcfe.jpg")
