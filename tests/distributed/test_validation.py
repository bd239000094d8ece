"""Validation finds the same whatever the ranks are, and training goes on as if there had been none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipelines.loader import open_indexes
from tests.distributed.harness import run_distributed
from tests.distributed.validating import Layout, Seen, run_layouts
from tests.trainer.conftest import corpora, tokenizer_path  # noqa: F401 # fixtures
from tests.trainer.tiny_job import overrides
from trainer.config import PretrainConfig, compose_config, fill_vocabulary

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
JOB = [
    "objective=paper",
    "model.causal_transformer.dropout=0.1",  # a validation that drew from the random state would show
    "model.language_model.init_std=0.2",
    "data.sources.laion.holdout=0.5",
    "data.sources.mmc4.holdout=0.4",
    "data.micro_batch_rows=1",
    "data.global_batch_rows=4",
    "validation.rows=100",  # all there are
    "validation.retrieval=12",
    "validation.samples=12",
    "validation.sample_tokens=6",
]
LAYOUTS = {
    "1 process": Layout(1, 1, 0),
    "1 process, ZeRO-3": Layout(1, 1, 3),
    **{f"dp 2, ZeRO-{stage}": Layout(2, 1, stage) for stage in range(4)},
    "dp 2, ZeRO-3, small weights kept": Layout(2, 1, 3, persistence_threshold=500, validated=(2, 3)),
    "dp 2, ZeRO-3, text only, full": Layout(2, 1, 3, recompute="full", objective="text_only"),
    "tp 2, ZeRO-1": Layout(1, 2, 1),
    "tp 2, ZeRO-3, sequence": Layout(1, 2, 3, sequence=True),
}
TRAINED = [name for name in LAYOUTS if name != "1 process, ZeRO-3"]


@pytest.fixture(scope="module")
def config(
    corpora: Path,  # noqa: F811
    tokenizer_path: Path,  # noqa: F811
) -> PretrainConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMU_DATA", str(corpora))
        config = compose_config(overrides(corpora, tokenizer_path, Path("run"), *JOB))
    fill_vocabulary(config)
    open_indexes(config.data, build_missing=True)
    return config


@pytest.fixture(scope="module")
def seen(config: PretrainConfig) -> dict[str, list[Seen]]:
    """By layout and rank."""
    results: dict[str, list[Seen]] = {}
    for world_size in (1, 2):
        here = {name: layout for name, layout in LAYOUTS.items() if layout.dp * layout.tp == world_size}
        by_rank = run_distributed(run_layouts, world_size, config, here, TRAINED, init_group=False, timeout_s=900.0)
        results |= {name: [of_rank[name] for of_rank in by_rank] for name in by_rank[0]}
    return results


def test_the_plain_loop_has_everything(seen: dict[str, list[Seen]]) -> None:
    """Text of either source, pictures, and a broken one among those of the first pairs."""
    plain = seen["plain"][0]
    assert plain.values.keys() == {
        *("loss/text", "loss/text/laion", "loss/text/mmc4", "loss/image", "loss/image/laion"),
        *("retrieval_at_1", "retrieval_of"),
    }
    assert 8 < plain.values["retrieval_of"] == len(plain.captions) < 12
    assert len({generated for _, _, generated in plain.captions}) > 5


@pytest.mark.parametrize("name", LAYOUTS)
def test_figures_and_captions_are_those_of_the_plain_loop(seen: dict[str, list[Seen]], name: str) -> None:
    expected = seen["plain"][0]
    for of_rank in seen[name]:
        assert of_rank.values == pytest.approx(expected.values, rel=TOLERANCE)
    assert seen[name][0].captions == expected.captions
    assert all(of_rank.captions == [] for of_rank in seen[name][1:])


@pytest.mark.parametrize("name", LAYOUTS)
def test_fewer_rows_than_ranks(seen: dict[str, list[Seen]], name: str) -> None:
    expected = seen["1 process"][0]
    assert expected.few.keys() >= {"loss/text/laion", "loss/image/laion"}
    assert "loss/text/mmc4" not in expected.few
    for of_rank in seen[name]:
        assert of_rank.few == pytest.approx(expected.few, rel=TOLERANCE)
    assert seen[name][0].few_captions == expected.few_captions


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_same_with_validation_in_between(seen: dict[str, list[Seen]], name: str) -> None:
    for of_rank in seen[name]:
        without, with_validation = of_rank.trainings
        assert without.keys() == with_validation.keys()
        for what, value in without.items():
            assert torch.equal(value, with_validation[what]), what
        half = len(of_rank.whole_weights) // 2
        begin = LAYOUTS[name].validated[0] == 0  # a validation before the first step makes the small ones whole sooner
        assert of_rank.whole_weights[begin:half] == of_rank.whole_weights[half + begin :]
        assert of_rank.kept_order[:half] == of_rank.kept_order[half:]
