"""A run goes on with other ranks, another global batch, another mixture: exact where it must be, recorded where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipelines.corpora import write_pairs
from tests.distributed.harness import run_distributed
from tests.distributed.test_resume import train_all
from tests.trainer.conftest import tokenizer_path  # noqa: F401 # a fixture
from tests.trainer.tiny_job import history, overrides, run_command, write_corpora

pytestmark = pytest.mark.slow

STOP_AFTER = 5
ADDITIVE = ("digest", "text_targets", "image_targets", "tokens", "images")
HALF = ["total_steps=15", "checkpoint.every_steps=5"]
REWEIGHTED = ["data.sources.laion.weight=16", "data.sources.laion_coco.weight=64"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for EMU_DATA with a source more than other tests use."""
    folder = tmp_path_factory.mktemp("emu_data")
    write_corpora(folder)
    (folder / "laion_coco").mkdir()
    write_pairs(folder / "laion_coco" / "00000.tar", 100, 20)
    return folder


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    data: Path,
    tokenizer_path: Path,  # noqa: F811
) -> Path:
    """`unbroken` on one rank; `elastic` begun on two ranks, gone on with on one and twice the batch; `reweighted`."""
    folder = tmp_path_factory.mktemp("elastic")

    def job(name: str, *more: str) -> list[str]:
        return overrides(data, tokenizer_path, folder / name, *HALF, *more)

    coco = "data.sources.laion_coco.options={caption: txt}"
    first = {name: job(name, f"stop_after_step={STOP_AFTER}") for name in ("elastic", "reweighted")}
    then = {
        "unbroken": job("unbroken"),
        "elastic": job("elastic", "data.global_batch_rows=16", "stop_after_step=10"),
        "reweighted": job("reweighted", *REWEIGHTED, coco, "checkpoint.allow_changes=true"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMU_DATA", str(data))
        assert run_distributed(train_all, 2, first, init_group=False) == [dict.fromkeys(first, 0)] * 2
        assert run_distributed(train_all, 1, then, init_group=False) == [dict.fromkeys(then, 0)]
    return folder


def by_step(run: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in history(run)}


def test_two_ranks_then_one_with_twice_the_batch_see_the_same_samples(runs: Path) -> None:
    unbroken, elastic = by_step(runs / "unbroken"), by_step(runs / "elastic")
    for step in range(1, STOP_AFTER + 1):
        assert [elastic[step][name] for name in ADDITIVE] == [unbroken[step][name] for name in ADDITIVE]
    for step in range(STOP_AFTER + 1, 11):
        twice = [unbroken[2 * step - STOP_AFTER - 1], unbroken[2 * step - STOP_AFTER]]
        assert [elastic[step][name] for name in ADDITIVE] == [sum(one[name] for one in twice) for name in ADDITIVE]


def test_other_weights_and_a_new_source_are_recorded_and_used(runs: Path) -> None:
    (changed,) = (
        event
        for event in map(json.loads, (runs / "reweighted" / "events.jsonl").read_text().splitlines())
        if event["event"] == "order_changed"
    )
    assert changed["step"] == STOP_AFTER
    assert "data.sources.laion.weight was 128.0 and is 16.0" in changed["changes"]
    before, after = by_step(runs / "reweighted")[STOP_AFTER], by_step(runs / "reweighted")[15]
    assert "laion_coco" not in before["samples"]
    gained = {name: count - before["samples"].get(name, 0) for name, count in after["samples"].items()}
    assert gained["laion_coco"] > gained["laion"]


def test_without_leave_another_mixture_is_refused_by_name(
    runs: Path,
    data: Path,
    tokenizer_path: Path,  # noqa: F811
) -> None:
    arguments = overrides(data, tokenizer_path, runs / "unbroken", *HALF, "data.sources.laion.weight=3")
    refused = run_command("trainer.pretrain", arguments, data, EMU_DATA=str(data))
    assert refused.returncode == 2
    assert "data.sources.laion.weight was 128.0 and is 3.0" in refused.stderr and "Traceback" not in refused.stderr


def test_a_begun_source_must_stay(
    runs: Path,
    data: Path,
    tokenizer_path: Path,  # noqa: F811
) -> None:
    arguments = overrides(data, tokenizer_path, runs / "unbroken", *HALF, "~data.sources.laion")
    arguments = [argument for argument in arguments if not argument.startswith("data.sources.laion.")]
    refused = run_command("trainer.pretrain", arguments, data, EMU_DATA=str(data))
    assert refused.returncode == 2
    assert "has begun to read the source 'laion'" in refused.stderr and "weight=0" in refused.stderr
