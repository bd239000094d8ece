"""The commands of data_pipelines.inspect on small corpora: what they find, print and return."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf import UserError
from data_pipelines import inspect
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.inspecting.bench import STAGES, Speed, advice, measure
from data_pipelines.inspecting.info import Histogram, mixture_info, source_info
from data_pipelines.inspecting.lint import Findings, lint_source
from data_pipelines.inspecting.settings import Opened, Settings, load_settings, open_all, spread
from data_pipelines.reader import SourceReader
from tests.data_pipelines.corpora import IMAGE_SIZE, NUM_QUERIES, make_config, write_pairs, write_texts

BROKEN_PNG = "image does not decode"


@pytest.fixture(scope="module")
def opened(small_config: DataConfig) -> Opened:
    return open_all(Settings(small_config, NUM_QUERIES, IMAGE_SIZE))


def no_holdout(config: DataConfig) -> DataConfig:
    sources = {name: dataclasses.replace(source, holdout=0.0) for name, source in config.sources.items()}
    return dataclasses.replace(config, sources=sources)


@pytest.mark.parametrize("workers", [0, 2])
def test_lint_counts_what_training_skips_and_masks(small_config: DataConfig, workers: int) -> None:
    """43 pictures: captions 3, 10, ... are empty, pictures 5, 16, ... are cut; 38 is both."""
    found = lint_source("pictures", dataclasses.replace(small_config, num_workers=workers), None, None)
    empty = [i for i in range(43) if i % 7 == 3]
    cut = [i for i in range(43) if i % 11 == 5 and i not in empty]
    assert found.skips == {"empty caption": len(empty)}
    assert found.undecodable.total() == len(cut)
    assert (found.num_shards, found.num_samples, found.num_documents) == (2, 43, 43 - len(empty))
    assert found.num_decoded == found.num_documents
    assert [example.name for example in found.examples["empty caption"]] == [f"{i:06d}" for i in empty[:3]]
    assert Path(found.examples["empty caption"][0].shard).name == "pairs-0.tar"
    assert 0 < found.num_held_out < 15
    assert found.broken == [] and found.num_duplicates == 0


def test_lint_looks_at_a_part(small_config: DataConfig) -> None:
    found = lint_source("pictures", small_config, 20, 0)
    assert 16 <= found.num_samples <= 32 and found.num_decoded == 0
    some = lint_source("pictures", small_config, None, 10)
    assert 0 < some.num_decoded < 25 and some.num_samples == 43


def test_lint_finds_damaged_shards_and_keys_that_come_twice(tmp_path: Path, tokenizer_path: Path) -> None:
    config = no_holdout(make_config(tmp_path, tokenizer_path))
    again = tmp_path / "text-1.tar"
    again.write_bytes((tmp_path / "text-0.tar").read_bytes()[:-12_000])
    source = SourceConfig(kind="text", shards=str(tmp_path / "text-*.tar"))
    found = lint_source("words", dataclasses.replace(config, sources={"words": source}), None, None)
    assert len(found.broken) == 1 and "text-1.tar" in found.broken[0]
    assert found.num_duplicates == found.num_samples - 25 > 0
    names = {example.name for example in found.examples["the same key again in this source"]}
    assert names <= {f"t{i:06d}" for i in range(25)}


def test_lint_names_every_shard_that_changed_and_goes_on(tmp_path: Path, tokenizer_path: Path) -> None:
    config = make_config(tmp_path, tokenizer_path)
    write_pairs(tmp_path / "pairs-1.tar", 50, 20)
    found = lint_source("pictures", config, None, 0)
    assert len(found.broken) == 1 and "pairs-1.tar" in found.broken[0]
    assert found.num_samples == 30
    (tmp_path / "pairs-0.tar").unlink()
    found = lint_source("pictures", config, None, 0)
    assert len(found.broken) == 2 and found.num_samples == 0


def test_lint_of_a_misread_source(small_config: DataConfig) -> None:
    source = dataclasses.replace(small_config.sources["words"], options={"text": "json:nothing"})
    found = lint_source("words", dataclasses.replace(small_config, sources={"words": source}), None, None)
    assert found.skips == {"no text": 25}
    assert found.broken == ["no sample of the source 'words' gives a document: check its kind and options"]


def test_lint_says_where_a_worker_died(small_config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SourceReader, "samples", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a worker died at or near byte 0 of the shard .*pairs-0.tar"):
        lint_source("pictures", dataclasses.replace(small_config, num_workers=1), None, None)


def test_info_counts_tokens_images_and_sizes(opened: Opened) -> None:
    pictures, words = (source_info(reader, opened, 1000) for reader in opened.readers())
    assert (pictures.num_samples, pictures.num_looked_at, words.num_documents) == (43, 43, 25)
    assert pictures.num_documents == 43 - sum(i % 7 == 3 for i in range(43))
    assert pictures.histograms["images"].counts[1] == pictures.num_documents
    assert words.histograms["images"].counts[0] == 25
    assert pictures.histograms["short side"].mean == 10  # 10 x 12 pixels
    assert pictures.histograms["aspect ratio"].mean == pytest.approx(10 / 12)
    shards = [Path(opened.indexes["words"].url(0))]
    assert 0 < words.nbytes <= sum(shard.stat().st_size for shard in shards)
    assert sum(words.histograms["tokens"].counts) == 25 and words.num_cut == 0
    shorter = dataclasses.replace(opened.settings, data=dataclasses.replace(opened.settings.data, seq_len=40))
    cut = source_info(opened.readers()[1], dataclasses.replace(opened, settings=shorter), 1000)
    at_most_40 = 25 - cut.num_cut
    assert 0 < at_most_40 < 25 and cut.histograms["tokens"].total < words.histograms["tokens"].total


def test_histograms_count_values_from_each_bound_on() -> None:
    histogram = Histogram((0, 1, 2, 4))
    for value in (0, 0.5, 1, 3.9, 4, 100):
        histogram.add(value)
    assert histogram.counts == [2, 1, 1, 2]
    assert histogram.mean == pytest.approx(109.4 / 6)


def test_info_tells_what_the_mixture_became(opened: Opened) -> None:
    mixture = mixture_info(opened, 40)
    assert mixture.weights == {"pictures": 0.75, "words": 0.25}
    assert mixture.num_rows == 40
    assert mixture.documents["pictures"] / mixture.documents.total() == pytest.approx(0.75, abs=0.05)
    assert mixture.images["words"] == 0 < mixture.images["pictures"]
    assert mixture.tokens.total() == pytest.approx(mixture.token_fill * 40 * 96)
    assert mixture.token_fill <= mixture.fill <= 1
    assert set(mixture.skips) == {"pictures: held out", "pictures: empty caption"}


@pytest.mark.parametrize("workers", [0, 1])
def test_bench_measures_rows_stages_and_memory(opened: Opened, workers: int) -> None:
    config = dataclasses.replace(opened.settings.data, num_workers=workers)
    settings = dataclasses.replace(opened.settings, data=config)
    speed = measure(dataclasses.replace(opened, settings=settings), 10)
    assert speed.num_rows == 10 and 0 < speed.num_images <= 50 and 0 < speed.num_tokens <= 960
    assert len(speed.worker_mb) == 1 and 20 < speed.worker_mb[0] < 10_000
    assert speed.stage_ms.keys() == {"pictures", "words"}
    assert all(spent.keys() == set(STAGES) for spent in speed.stage_ms.values())
    assert speed.stage_ms["pictures"]["decode"] > 0


def test_advice_says_how_many_workers_feed_the_gpus() -> None:
    speed = Speed(2, 100, 1.0, 10.0, 50_000, 1000, [])
    assert "2 processes feed 1.2 GPUs at 4,000 tokens/s" in advice(speed, 8, 4000)
    assert "8 GPUs take data.num_workers=2 and 16 cores" in advice(speed, 8, 4000)
    assert "data.num_workers=4 and" in advice(speed, 1, 10_000)


def test_spread_is_even_and_complete() -> None:
    assert list(spread(10, 100)) == list(range(10))
    assert list(spread(10, 3)) == [0, 3, 6]


def test_settings_come_from_the_overrides_of_a_job() -> None:
    of_the_trainer = ["init.weights=outputs/start", "parallel.tensor=2", "run_dir=x", "total_steps=5", "optim=tiny"]
    settings = load_settings(["+experiment=demo", "data.lanes=4", *of_the_trainer], None)
    assert (settings.num_queries, settings.image_size, settings.data.lanes) == (8, 48, 4)
    assert settings.data.sources["webvid"].kind == "webvid"
    assert load_settings(["data=demo", "model=emu_7b"], None).num_queries == 32


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data=demo", "data.lane=3"], "Key 'lane' not in 'DataConfig' at data.lane: see all keys"),
        (
            ["data=demo", "data.global_batch_rows=16", "data.lanes=3"],
            "data.global_batch_rows=16 is no multiple of data.lanes=3",
        ),
        (["data=nothing"], "Could not find 'data/nothing'"),
    ],
)
def test_wrong_overrides_are_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        load_settings(overrides, None)
    assert "\n" not in str(raised.value)


@pytest.fixture
def saved(small_config: DataConfig, tmp_path: Path) -> Path:
    """A run's config.yaml."""
    model = {"causal_transformer": {"num_queries": NUM_QUERIES}, "vision": {"image_size": IMAGE_SIZE}}
    content = {"data": dataclasses.asdict(small_config), "model": model, "seed": 3}
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(content), path)
    return path


def test_settings_come_from_a_run(saved: Path, small_config: DataConfig, tmp_path: Path) -> None:
    settings = load_settings(["data.seq_len=64"], saved)
    assert settings == Settings(dataclasses.replace(small_config, seq_len=64), NUM_QUERIES, IMAGE_SIZE)
    (tmp_path / "other.yaml").write_text("a: 1")
    for wrong in (tmp_path / "other.yaml", tmp_path / "missing.yaml"):
        with pytest.raises(UserError, match=r"is no configuration of a run: give the config.yaml"):
            load_settings([], wrong)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["inspect", *arguments])
    code = inspect.main()
    return code, capsys.readouterr().out


def test_commands_end_with_what_to_do_next(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = ["--config", str(saved)]
    code, out = run(monkeypatch, capsys, "lint", *config)
    assert code == 0 and "empty caption" in out and "pairs-0.tar: 000003" in out
    assert "0 sources are broken\nnext: python -m data_pipelines.inspect info" in out
    code, out = run(monkeypatch, capsys, "info", "--rows", "20", *config)
    assert code == 0 and "mixture over 20 rows" in out and out.splitlines()[-1].startswith("next: ")
    code, out = run(monkeypatch, capsys, "bench", "--rows", "2", *config)
    assert code == 0 and "tokens a second" in out and out.splitlines()[-1].startswith("next: ")
    code, out = run(monkeypatch, capsys, "preview", "--rows", "2", "--out", str(tmp_path / "p"), *config)
    assert code == 0 and (tmp_path / "p" / "preview.html").exists() and out.splitlines()[-1].startswith("next: ")


def test_machines_get_json(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", str(saved), "--json"]
    _, out = run(monkeypatch, capsys, "lint", *config)
    pictures = json.loads(out)["pictures"]
    assert pictures["skips"] == {"empty caption": 6} and pictures["examples"]["empty caption"][0][1] == "000003"
    _, out = run(monkeypatch, capsys, "info", "--rows", "5", *config)
    info = json.loads(out)
    assert sum(info["mixture"]["documents"].values()) > 0
    assert sum(info["sources"]["words"]["histograms"]["tokens"]["counts"]) == 25
    _, out = run(monkeypatch, capsys, "bench", "--rows", "2", *config)
    assert math.isfinite(json.loads(out)["rows_per_s"])


def test_lint_exits_with_1_where_something_is_broken(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shard = write_texts(tmp_path / "t.tar", 0, 20)
    shard.write_bytes(shard.read_bytes()[:-12_000])
    options = [f"data.sources.words.shards={shard}", "data.sources.pictures.weight=0", "--config", str(saved)]
    code, out = run(monkeypatch, capsys, "lint", *options)
    assert code == 1 and "broken words: " in out and "t.tar" in out
    assert "1 sources are broken\nnext: restore" in out


def test_a_count_beside_a_shard_that_disagrees_is_only_a_remark(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_texts(tmp_path / "text-0.tar", 0, 31)
    (tmp_path / "text-0_stats.json").write_text('{"successes": 30}')
    remark = f"{tmp_path / 'text-0.tar'}: holds 31 samples, but text-0_stats.json beside it says 30"
    options = [f"data.sources.words.shards={tmp_path / 'text-*.tar'}", "data.sources.pictures.weight=0"]
    options += ["data.sources.words.holdout=0", "--config", str(saved)]
    code, out = run(monkeypatch, capsys, "lint", "--json", *options)
    words = json.loads(out)["words"]
    assert (code, words["broken"], words["remarks"]) == (0, [], [remark])
    code, out = run(monkeypatch, capsys, "lint", *options)
    assert code == 0 and f"remark words: {remark}" in out and "0 sources are broken" in out


def test_damage_is_no_remark_where_a_count_disagrees_as_well(small_config: DataConfig, tmp_path: Path) -> None:
    shard = write_texts(tmp_path / "cut.tar", 0, 25)
    shard.write_bytes(shard.read_bytes()[:-12_000])
    (tmp_path / "cut_stats.json").write_text('{"successes": 25}')
    sources = {"words": SourceConfig(kind="text", shards=str(shard))}
    config = dataclasses.replace(small_config, sources=sources, index_dir=str(tmp_path / "index"))
    found = lint_source("words", config, None, 0)
    assert len(found.broken) == 1 and "the rest is left out" in found.broken[0]
    assert len(found.remarks) == 1 and "cut_stats.json beside it says 25" in found.remarks[0]


def test_findings_of_parts_add_up() -> None:
    whole = Findings()
    for part in range(5):
        found = Findings(num_samples=2, skips=Counter({"x": part}), broken=["same"])
        found.examples = {"x": [("shard", str(part))]}  # type: ignore[list-item]
        whole.add(found)
    assert (whole.num_samples, whole.skips["x"], whole.broken) == (10, 10, ["same"])
    assert [name for _, name in whole.examples["x"]] == ["0", "1", "2"]
