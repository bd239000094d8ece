from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from conf import UserError
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.validate import validate_batching

SOURCE = SourceConfig("pairs", "x.tar")
CONFIG = DataConfig({"a": SOURCE}, "tokenizer.model", seq_len=64, lanes=8, global_batch_rows=16, micro_batch_rows=2)


def changed_source(**change: Any) -> dict[str, SourceConfig]:
    return {"a": dataclasses.replace(SOURCE, **change)}


def test_a_good_configuration_passes() -> None:
    for dp_size in (1, 2, 4, 8):
        validate_batching(CONFIG, dp_size, num_queries=32)


@pytest.mark.parametrize(
    ("change", "dp_size", "words"),
    [
        ({}, 3, "data.lanes=8"),
        ({"global_batch_rows": 12}, 1, "data.global_batch_rows=12"),
        ({"micro_batch_rows": 3}, 1, "data.micro_batch_rows=3"),
        ({"micro_batch_rows": 4}, 8, "data.micro_batch_rows=4"),
        ({"micro_batch_rows": 0}, 1, "data.micro_batch_rows=0"),
        ({"lanes": -1}, 1, "data.lanes=-1"),
        ({"num_workers": -1}, 1, "data.num_workers=-1"),
        ({"seq_len": 36}, 1, "make it at least 37"),
        ({"weight_unit": "rows"}, 1, "data.weight_unit=rows is unknown"),
        ({"sources": {}}, 1, "data.sources is empty"),
        ({"sources": changed_source(weight=0.0)}, 1, "weight 0"),
        ({"sources": changed_source(weight=-1.0)}, 1, "data.sources.a.weight=-1.0"),
        ({"sources": changed_source(weight=float("nan"))}, 1, "data.sources.a.weight=nan"),
        ({"sources": changed_source(holdout=1.5)}, 1, "data.sources.a.holdout=1.5"),
    ],
)
def test_what_cannot_run_is_named(change: dict[str, Any], dp_size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate_batching(dataclasses.replace(CONFIG, **change), dp_size, num_queries=32)


def test_login_nodes_need_no_torch() -> None:
    program = "import sys, data_pipelines.validate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
