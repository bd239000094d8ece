"""Broken shards through index, loader and decode: what is good comes out, what is bad is counted with its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.inspecting.lint import lint_source
from data_pipelines.loader import open_indexes
from data_pipelines.reader import SourceReader
from tests.conftest import REAL_DATA
from tests.data_pipelines.test_loader import make_loader
from tests.data_pipelines.test_real_shards import CORRUPT

TARS = sorted(CORRUPT)
ODD = {"txt_1mb.tar": {"000000001"}, "path_traversal.tar": {"../../etc/evil2"}}
"""Odd samples, decodable with care, that are skipped: a caption of a megabyte, and a name without a caption."""


@pytest.fixture(params=TARS)
def name(request: pytest.FixtureRequest, real_data: Path) -> str:
    return request.param


def zoo_config(real_data: Path, name: str, folder: Path) -> DataConfig:
    source = SourceConfig("webvid" if name.startswith("mp4") else "laion", str(real_data / "corrupt" / name))
    return DataConfig(
        {"zoo": source},
        str(real_data / "tokenizer" / "tokenizer.model"),
        str(folder),
        seq_len=512,
        max_images_per_row=12,
        global_batch_rows=1,
        lanes=1,
        window_rows=2,
        num_workers=0,
    )


def expected(real_data: Path, name: str) -> dict[str, Any]:
    return json.loads((real_data / "corrupt" / "expected.json").read_text())[name]


def test_good_samples_are_trained_on_and_bad_ones_counted(real_data: Path, name: str, tmp_path: Path) -> None:
    """Whole epochs of the loader: every sample that was there is emitted whole, emitted masked, or skipped."""
    config, facts = zoo_config(real_data, name, tmp_path), expected(real_data, name)
    (index,) = open_indexes(config, build_missing=True).values()
    reader = SourceReader("zoo", config, index)
    names = {key: sample.name for chunk in range(index.num_chunks) for key, sample in reader.samples(chunk)}
    whole: Counter[str] = Counter()
    masked: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    for batch in make_loader(config):
        for key, ok in zip(batch.keys[0], batch.document_ok[0].tolist(), strict=False):
            (whole if ok else masked)[names[key]] += 1
        skips.update({reason: count for (_, reason), count in batch.all_skips().items()})
        cursor = batch.cursors[0]
        if cursor.row == 0 and cursor.sources[0][0] >= 2 * reader.units.num_units:
            break
    bad = CORRUPT[name]
    assert set(whole) == set(names.values()) - set(bad)
    assert set(facts["good_keys"]) <= set(whole)
    assert not set(facts.get("bad_keys", {})) & set(whole)
    assert set(facts.get("odd_keys", {})) - set(whole) <= ODD.get(name, set())
    assert set(skips) == set(bad.values())
    q, offset = cursor.sources[0]
    units = [reader.units.unit(number) for number in range(q)]
    num_read = sum(unit.last - unit.first for unit in units) + offset
    assert whole.total() + skips.total() == num_read, "emitted and skipped are not what was there"
    lost = facts["samples"] - len(names)
    assert lost == {"truncated_tar.tar": 1, "path_traversal.tar": -1}.get(name, 0)
    assert lost <= index.num_defects


def test_lint_tells_the_same(real_data: Path, name: str, tmp_path: Path) -> None:
    found = lint_source("zoo", zoo_config(real_data, name, tmp_path), None, None)
    assert found.skips + found.undecodable == Counter(CORRUPT[name].values())
    examples = {example.name for reason in CORRUPT[name].values() for example in found.examples[reason]}
    assert examples == set(CORRUPT[name])
    assert bool(found.broken) == (name == "truncated_tar.tar")


def test_the_zoo_is_complete() -> None:
    """Without this, an empty folder would pass."""
    if not REAL_DATA.is_dir():
        pytest.skip("no real shards")
    assert set(TARS) == set(json.loads((REAL_DATA / "corrupt" / "expected.json").read_text()))
