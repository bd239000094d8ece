"""The parts of validation: which documents, retrieval, generation, files; models are rigged."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conf import UserError
from data_pipelines.heldout import is_pair, num_enough, pack_first, text_first, text_of, to_be_continued
from data_pipelines.index import Index
from data_pipelines.loader import holdout_documents, open_indexes
from data_pipelines.packing import tokenize_documents
from data_pipelines.retries import UnreachableError
from data_pipelines.tokenizer import Tokenizer
from tests.trainer.tiny_job import overrides, run_command
from trainer import held_out as held_out_module
from trainer.config import MonitorConfig, PretrainConfig, compose_config, fill_vocabulary
from trainer.held_out import Dealt, HeldOut
from trainer.monitor import Monitor
from trainer.samples import NUM_KEPT, Sample, write_samples
from trainer.topology import Topology
from trainer.validation import captions, mean_losses, retrieval, run_validation, share_nearest

CPU = torch.device("cpu")
HELD = ["data.sources.laion.holdout=0.5", "data.sources.mmc4.holdout=0.4"]


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def compose(corpora: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("EMU_DATA", str(corpora))

    def composed(*more: str) -> tuple[PretrainConfig, dict[str, Index], Tokenizer]:
        config = compose_config(overrides(corpora, tokenizer_path, Path("run"), *more))
        tokenizer = fill_vocabulary(config)
        return config, open_indexes(config.data, build_missing=True), tokenizer

    return composed


def held_out_of(
    composed: tuple[PretrainConfig, dict[str, Index], Tokenizer], *, dp: tuple[int, int] = (0, 1)
) -> HeldOut:
    return HeldOut(*composed, Topology(dp_rank=dp[0], dp_size=dp[1]))


def all_held_out(composed: tuple[PretrainConfig, dict[str, Index], Tokenizer], source: str) -> list[Any]:
    config, indexes, tokenizer = composed
    documents = [(key, 0, document) for key, document in holdout_documents(config.data, indexes[source], source)]
    return tokenize_documents(documents, tokenizer, 3, config.data.seq_len, 4)


def test_rows_hold_the_first_documents_that_fill_them(compose: Any) -> None:
    composed = compose(*HELD, "validation.rows=3")
    held_out = held_out_of(composed)
    rows = held_out.chosen().rows
    for source in ("laion", "mmc4"):
        every = [document.key for document in all_held_out(composed, source)]
        searched = num_enough(all_held_out(composed, source), 3, composed[0].data)
        assert len(held_out._search(source)) == searched  # and not what happens to be in the last chunk
        used = [d.key for row in rows.own for d in row.documents if d.key.source == source]
        assert sorted(used) == every[: len(used)] and len(used) < len(every)
        assert sum(row.documents[0].key.source == source for row in rows.own) == 3
    assert all(len({d.key.source for d in row.documents}) == 1 for row in rows.own)
    assert all(sum(len(d.input_ids) for d in row.documents) <= 64 for row in rows.own)


def test_no_more_is_read_than_wanted(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    original = held_out_module.read_held_out

    def counted(reader: Any, chunk: int, settings: Any) -> Any:
        read.append((reader.name, chunk))
        return original(reader, chunk, settings)

    monkeypatch.setattr(held_out_module, "read_held_out", counted)
    held_out = held_out_of(compose(*HELD, "validation.rows=1"))
    assert read == []
    held_out.chosen()
    held_out.chosen()
    assert len(read) == len(set(read)) < sum(index.num_chunks for index in held_out._indexes.values())


def test_rows_are_dealt_in_turn_and_every_rank_has_as_many_passes(compose: Any) -> None:
    composed = compose(*HELD, "validation.rows=3")
    whole = held_out_of(composed).chosen().rows
    parts = [held_out_of(composed, dp=(rank, 4)).chosen().rows for rank in range(4)]
    assert sorted(row.number for part in parts for row in part.own) == list(range(whole.total))
    for part in parts:
        for row in part.own:
            assert [d.key for d in row.documents] == [d.key for d in whole.own[row.number].documents]
    assert [[len(rows) for rows in part.passes(1, 4)] for part in parts] == [[1, 1], [1, 1], [1, 0], [1, 0]]
    assert [len(Dealt(part.own, part.total).passes(2, 4)) for part in parts] == [1] * 4


def test_without_held_out_documents_nothing_runs(compose: Any) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError

    composed = compose("data.sources.laion.holdout=0")
    held_out = held_out_of(composed)
    assert mean_losses(refuse, CPU, held_out) == {}  # type: ignore[arg-type]
    assert retrieval(refuse, CPU, held_out) == {}  # type: ignore[arg-type]
    engine = SimpleNamespace(module=torch.nn.Linear(1, 1), optimizer=None, device=CPU)
    run_validation(engine, held_out, refuse, 1)  # type: ignore[arg-type]


def test_a_holdout_too_small_to_be_found_is_told(compose: Any, caplog: pytest.LogCaptureFixture) -> None:
    held_out = held_out_of(compose("data.sources.laion.holdout=1e-9"))
    assert held_out.chosen().rows.total == 0
    assert "laion has no held-out document in its first" in caplog.text


def test_unreachable_chunks_are_passed_over_only_where_allowed(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise UnreachableError("no answer")

    monkeypatch.setattr("data_pipelines.reader.SourceReader.samples", fail)
    with pytest.raises(UserError):
        held_out_of(compose(*HELD)).chosen()
    assert held_out_of(compose(*HELD, "data.skip_unreachable=true")).chosen().rows.total == 0


def test_pictures_beyond_the_budget_are_read_again(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = compose(*HELD)
    plenty, scarce = held_out_of(composed), held_out_of(composed)
    kept = []
    for held_out, nbytes in ((plenty, 10**6), (scarce, 700)):
        monkeypatch.setattr(held_out_module, "HELD_BYTES", nbytes)
        documents = [d for row in held_out.chosen().rows.own for d in row.documents if d.image_starts]
        kept.append([len(document.pictures or []) for document in documents])
    assert all(kept[0]) and 0 < sum(kept[1]) < sum(kept[0])
    assert retrieval(sees_the_picture, CPU, plenty) == retrieval(sees_the_picture, CPU, scarce)  # type: ignore[arg-type]


def test_pairs_and_prompts(compose: Any) -> None:
    composed = compose(*HELD)
    tokenizer = composed[2]
    slots = [tokenizer.img_start, *[tokenizer.image] * 3, tokenizer.img_end]
    documents = all_held_out(composed, "laion")
    orders = set()
    for document in documents:
        text = text_of(document, 3)
        assert is_pair(document, 3) and text
        orders.add(document.image_starts[0] == 1)
        pair = text_first(document, tokenizer, 3, 64)
        assert pair.input_ids.tolist() == [tokenizer.bos, *text, *slots, tokenizer.eos]
        assert pair.image_starts == [1 + len(text)] and pair.pictures == document.pictures
        assert text_first(document, tokenizer, 3, 9).input_ids.tolist() == [1, *text[:2], *slots, tokenizer.eos]
        assert to_be_continued(document, tokenizer, 3, 2).input_ids.tolist() == [tokenizer.bos, *slots, 0, 0]
    assert orders == {True, False}
    assert not any(is_pair(document, 3) for document in all_held_out(composed, "mmc4"))
    lone = dataclasses.replace(documents[0], input_ids=to_be_continued(documents[0], tokenizer, 3, 1).input_ids)
    assert not is_pair(dataclasses.replace(lone, image_starts=[1]), 3)


def test_rows_are_as_many_as_asked_for(compose: Any) -> None:
    composed = compose(*HELD)
    documents, data = all_held_out(composed, "mmc4"), composed[0].data
    enough = num_enough(documents, 2, data)
    assert enough is not None and num_enough(documents[: enough - 1], 2, data) is None
    for number in (1, 2, 3):
        rows = pack_first(documents, number, data)
        assert len(rows) == number
        kept = [document.key for row in rows for document in row]
        assert sorted(kept) == [document.key for document in documents[: len(kept)]]


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_nearest_is_found_behind_a_direction_that_all_share(scale: float) -> None:
    torch.manual_seed(0)
    true, common = torch.randn(40, 16), 30 * torch.randn(2, 16)
    right = share_nearest(scale * (true + 0.1 * torch.randn(40, 16)) + common[0], true + common[1])
    assert right == (1.0 if scale > 0 else 0.0)


def test_chance_and_collapse() -> None:
    torch.manual_seed(0)
    shares = [share_nearest(torch.randn(32, 16), torch.randn(32, 16)) for _ in range(50)]
    assert 0.5 / 32 < sum(shares) / 50 < 2 / 32
    assert share_nearest(torch.ones(32, 16), torch.randn(32, 16)) == 1 / 32


def sees_the_picture(**inputs: Any) -> dict[str, Tensor]:
    """Regresses the very picture."""
    pixels = inputs["images"].flatten(1).float()[:, :32]
    return {"regressed": 2 * pixels + 1, "first_slots": pixels}


def test_retrieval_with_a_rigged_model(compose: Any) -> None:
    held_out = held_out_of(compose(*HELD, "validation.retrieval=12"))
    found = retrieval(sees_the_picture, CPU, held_out)  # type: ignore[arg-type]
    assert found == {"retrieval_at_1": 1.0, "retrieval_of": 10}  # the pictures of two are broken

    def is_off_by_one(**inputs: Any) -> dict[str, Tensor]:
        seen = sees_the_picture(**inputs)
        return {**seen, "regressed": seen["regressed"].roll(1, 0)}

    found = retrieval(is_off_by_one, CPU, held_out)  # type: ignore[arg-type]
    assert found["retrieval_at_1"] < 0.3


def test_captions_of_a_rigged_model(compose: Any) -> None:
    """It says 5 + place, and to every second picture `</s>` at the third place; the caption ends there."""
    composed = compose(*HELD, "validation.samples=4", "validation.sample_tokens=5")
    held_out = held_out_of(composed)
    calls = []

    def model(**inputs: Any) -> dict[str, Tensor]:
        calls.append(inputs["input_ids"][:, 6:].clone())
        tokens = torch.arange(5, 10).repeat(len(inputs["input_ids"]), 1)
        tokens[1::2, 2:] = composed[2].eos
        return {"next_tokens": tokens.flatten()}

    whole, short = [5, 6, 7, 8, 9], [5, 6]
    assert captions(model, CPU, held_out) == {0: whole, 1: short, 2: whole, 3: short}  # type: ignore[arg-type]
    assert [call[0].tolist() for call in calls] == [whole[:n] + [0] * (5 - n) for n in range(5)]


def test_generation_ends_when_every_caption_has(compose: Any) -> None:
    composed = compose(*HELD, "validation.samples=3", "validation.sample_tokens=30")
    calls = []

    def model(**inputs: Any) -> dict[str, Tensor]:
        calls.append(None)
        tokens = torch.full((3, 30), composed[2].eos)
        tokens[2, 0] = 7
        return {"next_tokens": tokens.flatten()}

    assert captions(model, CPU, held_out_of(composed)) == {0: [], 1: [], 2: [7]}  # type: ignore[arg-type]
    assert len(calls) == 2


def sample(text: str = "a red square") -> Sample:
    return Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), "laion", text, "ein Würfel")


def test_sample_folders(tmp_path: Path) -> None:
    assert write_samples(tmp_path, 1, []) is None and not (tmp_path / "samples").exists()
    for step in range(1, NUM_KEPT + 4):
        write_samples(tmp_path, step, [sample("old"), sample("old")])
    folder = write_samples(tmp_path, NUM_KEPT + 3, [sample()])
    assert folder == tmp_path / "samples" / "step-00000023"
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "samples.json"]
    assert json.loads((folder / "samples.json").read_text(encoding="utf-8")) == [
        {"image": "0.png", "source": "laion", "truth": "a red square", "generated": "ein Würfel"}
    ]
    kept = sorted(path.name for path in folder.parent.iterdir())
    assert kept == [f"step-{step:08d}" for step in range(4, NUM_KEPT + 4)]


def test_samples_that_cannot_be_written_end_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "samples").write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        assert write_samples(tmp_path, 7, [sample()]) is None
    assert "the samples of step 7 could not be written" in caplog.text


class Wandb:
    def __init__(self, fails: bool) -> None:
        self.fails, self.logged = fails, []  # type: ignore[var-annotated]

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fails:
            raise ConnectionError
        self.logged.append((step, values))

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_monitor_does_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: bool) -> None:
    monitor = Monitor(tmp_path, MonitorConfig(wandb="disabled"), {}, 3)
    monitor.wandb = Wandb(fails)
    folder = write_samples(tmp_path, 20, [sample()])
    monitor.validation(20, {"loss/text": 2.5, "retrieval_at_1": 0.25, "retrieval_of": 32}, folder)
    monitor.validation(40, {"loss/text": 2.0})
    (tmp_path / "gone").mkdir()
    if not fails:
        sent = monitor.wandb.logged
        assert sent[0] == (
            20,
            {"validation/loss/text": 2.5, "validation/retrieval_at_1": 0.25, "validation/retrieval_of": 32},
        )
        assert sent[1][1]["validation/samples"][0]._caption == "ein Würfel (truth: a red square)"
        monitor.validation(60, {"loss/text": 1.5}, tmp_path / "gone")  # no samples.json: a warning, no end
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert lines[0] == {"attempt": 3, "step": 20, "loss/text": 2.5, "retrieval_at_1": 0.25, "retrieval_of": 32}
    assert [line["step"] for line in lines[:2]] == [20, 40]
    assert "validation at step 20: loss/text 2.5  retrieval_at_1 0.25  retrieval_of 32" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_validates_when_it_is_due(corpora: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ["total_steps=5", "validation.every_steps=2", "validation.rows=2", "monitor.wandb=offline"]
    done = run_command(
        "trainer.pretrain", overrides(corpora, tokenizer_path, run_dir, *HELD, *more), tmp_path, EMU_DATA=str(corpora)
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(1, 2), (1, 4)]
    assert lines[0].keys() == {
        *("attempt", "step", "loss/text", "loss/text/laion", "loss/text/mmc4", "loss/image", "loss/image/laion"),
        *("retrieval_at_1", "retrieval_of"),
    }
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == ["step-00000002", "step-00000004"]
    samples = json.loads((run_dir / "samples" / "step-00000004" / "samples.json").read_text(encoding="utf-8"))
    assert len(samples) == 4 and all(sample["truth"] for sample in samples)
    assert "wandb" not in done.stdout + done.stderr
