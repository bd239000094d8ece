"""The folder format, without DeepSpeed: an engine of ZeRO stage 0 is a module and an optimizer."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from conf import UserError
from models.weights import tensor_files
from models.weights.fragment_files import read_weights
from trainer import checkpoint_folder
from trainer.checkpoint import load_checkpoint, read_rank_state, read_state
from trainer.checkpoint_folder import find_damage, find_latest, prune
from trainer.checkpoint_writer import save_checkpoint
from trainer.topology import Topology

ALONE = Topology()
FILES = ("fragments-00000.safetensors", "fragments-00000.json", "rank_state-00000.json", "state.json", "manifest.json")


def make_engine(seed: int = 0, num_steps: int = 0, width: int = 3) -> Any:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        module(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
    return SimpleNamespace(module=module, optimizer=optimizer)


def save(run: Path, step: int, engine: Any = None, permanent: bool = False) -> Path:
    state, rank_state = {"cursors": [step, 2]}, {"torch": [step]}
    return save_checkpoint(run, engine or make_engine(num_steps=2), ALONE, step, state, rank_state, permanent)


def assert_same(a: Any, b: Any) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True))
    for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True):
        first, second = a.optimizer.state[p], b.optimizer.state[q]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    saved, loaded = make_engine(seed=1, num_steps=3), make_engine(seed=2)
    path = save(tmp_path, 100, saved)
    assert path == tmp_path / "checkpoints" / "step-00000100"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    state = load_checkpoint(path, loaded, ALONE)
    assert (state.step, state.state) == (100, {"cursors": [100, 2]})
    assert read_rank_state(path, ALONE) == {"torch": [100]}
    assert read_rank_state(path, Topology(dp_size=2)) is None
    assert_same(saved, loaded)


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    path = save(tmp_path, 0, make_engine())
    with safe_open(path / FILES[0], framework="pt") as file:
        assert all(key.endswith("|weight") for key in file.keys())  # noqa: SIM118
    loaded = make_engine(seed=2, num_steps=5)
    load_checkpoint(path, loaded, ALONE)
    for state in loaded.optimizer.state.values():
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_weights_alone_start_with_a_fresh_optimizer(tmp_path: Path) -> None:
    saved, loaded = make_engine(seed=1, num_steps=3), make_engine(seed=2, num_steps=1)
    load_checkpoint(save(tmp_path, 1, saved), loaded, ALONE, with_optimizer=False)
    assert torch.equal(saved.module[0].weight, loaded.module[0].weight)
    assert not any(state["exp_avg"].any() or state["step"] for state in loaded.optimizer.state.values())


def test_frozen_parameters_are_stored_without_moments(tmp_path: Path) -> None:
    saved, loaded = make_engine(seed=1), make_engine(seed=2)
    for engine in (saved, loaded):
        engine.module[0].weight.requires_grad_(False).data = engine.module[0].weight.data.bfloat16()
    load_checkpoint(save(tmp_path, 1, saved), loaded, ALONE)
    assert torch.equal(saved.module[0].weight, loaded.module[0].weight)
    assert loaded.module[0].weight not in loaded.optimizer.state


def test_read_weights_gives_whole_parameters_by_name(tmp_path: Path) -> None:
    engine = make_engine(num_steps=1)
    weights = dict(read_weights(save(tmp_path, 1, engine)))
    assert weights.keys() == dict(engine.module.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in engine.module.named_parameters())


def test_persistent_buffers_are_refused(tmp_path: Path) -> None:
    engine = make_engine()
    engine.module.register_buffer("mean", torch.zeros(3))
    with pytest.raises(UserError, match="mean"):
        save(tmp_path, 1, engine)


def test_checkpoint_of_another_model_is_one_sentence_with_the_differences(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    other = make_engine(width=4)
    other.module.add_module("head", nn.Linear(1, 1))
    before = [p.clone() for p in other.module.parameters()]
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, other, ALONE)
    message = str(caught.value)
    assert "another model" in message and "\n" not in message and str(path) in message
    assert "head.bias is only in the model" in message and "0.bias has shape [3] in the checkpoint and [4]" in message
    assert "and 2 more differences" in message
    assert all(torch.equal(p, q) for p, q in zip(before, other.module.parameters(), strict=True)), "nothing was loaded"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, name: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    assert find_latest(tmp_path) == newer and not caplog.records
    damage(newer / name)
    assert find_latest(tmp_path) == older
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(newer) in record.getMessage()
    if name == "manifest.json" and damage is flip_a_bit:
        return  # a flipped digest in the manifest accuses the file it stands for
    assert name in record.getMessage()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_damaged_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    opened = io.open

    def open_or_fail(file: Any, *args: Any, **kwargs: Any) -> Any:
        if file == newer / name:
            raise OSError(errno.EIO, "Input/output error")
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("io.open", open_or_fail)
    assert find_latest(tmp_path) == older
    assert f"{name} cannot be read: Input/output error" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    truncate(save(tmp_path, 1) / FILES[0])
    manifest = save(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError) as refusal:
        find_latest(tmp_path)
    sentence = str(refusal.value)
    assert "has no checkpoint that can be used (step-00000002: manifest.json has format 1" in sentence
    assert "step-00000001: fragments-00000.safetensors has" in sentence


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    """Of three, exactly one sees a damage, whichever file has it; together they see all files."""
    for number, name in enumerate(FILES[:4]):
        path = save(tmp_path, number)
        flip_a_bit(path / name)
        seen = [find_damage(path, share=(rank, 3)) for rank in range(3)]
        assert [damage for damage in seen if damage] == [find_damage(path)]


def test_manifests_do_not_reach_outside_their_folder(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (tmp_path / "outside").write_text("x")
    manifest["files"]["../../outside"] = checkpoint_folder.describe_file(tmp_path / "outside")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the folder" in (find_damage(path) or "")


def test_a_half_copied_or_foreign_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json is missing"):
        read_state(tmp_path)
    path = save(tmp_path, 1)
    truncate(path / FILES[0])
    with pytest.raises(UserError, match=FILES[0]):
        load_checkpoint(path, make_engine(), ALONE)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None


def test_latest_goes_before_later_steps_of_a_given_up_attempt(tmp_path: Path) -> None:
    """A run resumed from step 1 by hand must go on from what it wrote since, not from the old step 3."""
    save(tmp_path, 3)
    again = save(tmp_path, 2)
    assert find_latest(tmp_path) == again
    shutil.rmtree(again)
    assert find_latest(tmp_path) == tmp_path / "checkpoints" / "step-00000003"


class Killed(BaseException):
    """Stands for SIGKILL: nothing that runs afterwards may matter, so nothing may catch it."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the calls that change the disk; die at call `budget` // 2, before (even) or after (odd) its effect."""
    counter = {"calls": 0, "budget": 10**9}

    def dying(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            point = counter["calls"]
            counter["calls"] += 2
            if point == counter["budget"]:
                if name == "rmtree":  # is not atomic: die half-way
                    min(file for file in Path(args[0]).iterdir()).unlink()
                raise Killed
            result = original(*args, **kwargs)
            if point + 1 == counter["budget"]:
                raise Killed
            return result

        return call

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, dying(name, getattr(owner, name)))
    monkeypatch.setattr(tensor_files, "_write", dying("_write", tensor_files._write))
    return counter


@pytest.mark.slow
@pytest.mark.parametrize("new_step", [2, 1], ids=["new step", "step saved before"])
def test_a_kill_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path, kill_at: dict[str, int], new_step: int) -> None:
    """Steps 0 and 1 are there; while another is written the run dies, at each write in turn."""
    budget, found = 0, set()
    while True:
        run = tmp_path / str(budget)
        older, newest = save(run, 0), save(run, 1)
        kill_at.update(calls=0, budget=budget)
        try:
            written = save(run, new_step, make_engine(seed=9, num_steps=4))
            prune(run, keep=1)
        except Killed:
            kill_at["budget"] = 10**9
        else:
            break
        visible = [path for path in (run / "checkpoints").glob("step-*") if not path.suffix]
        assert visible and not any(find_damage(path) for path in visible), "only whole ones have a final name"
        latest = find_latest(run)
        assert latest in (older, newest, run / "checkpoints" / f"step-{new_step:08d}")
        assert latest != older or new_step == 1, "only a replaced checkpoint may cost one interval"
        load_checkpoint(latest, make_engine(), ALONE)
        again = save(run, new_step)
        assert find_latest(run) == again, "the leftovers are in nobody's way"
        prune(run, keep=1)
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", again.name}
        found.add(latest.name)
        budget += 1
    assert budget > 20 and find_latest(run) == written
    assert found == {newest.name, written.name} | ({older.name} if new_step == 1 else set())


def test_prune_keeps_the_newest_rolling_and_all_permanent_ones(tmp_path: Path) -> None:
    paths = {step: save(tmp_path, step, permanent=step in (2, 4)) for step in range(1, 8)}
    assert prune(tmp_path, keep=2) == [paths[step] for step in (5, 3, 1)]
    assert [step for step, path in paths.items() if path.exists()] == [2, 4, 6, 7]
    assert prune(tmp_path, keep=2) == []


def test_prune_deletes_what_an_attempt_that_was_given_up_has_left(tmp_path: Path) -> None:
    """It would count for `keep`, and be taken where the latest is damaged."""
    save(tmp_path, 9), save(tmp_path, 8)
    kept = save(tmp_path, 7, permanent=True)
    older, latest = save(tmp_path, 1), save(tmp_path, 2)
    prune(tmp_path, keep=2)
    assert sorted((tmp_path / "checkpoints").glob("step-*")) == [older, latest, kept]
    assert find_latest(tmp_path) == latest


def test_what_cannot_be_deleted_stays_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As over the network, where another process still reads a file of it."""
    paths = [save(tmp_path, step) for step in range(4)]

    def refuse(*_: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as busy:
        busy.setattr(shutil, "rmtree", refuse)
        assert prune(tmp_path, keep=2) == [paths[1], paths[0]]
        prune(tmp_path, keep=2)
        save(tmp_path, 4)
    assert "step-00000000.removed could not be deleted (Device or resource busy)" in caplog.text
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000004"]


def test_a_save_makes_room_of_what_failed_before_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-00000001.partial", "step-00000002.removed"):
        (folder / name).mkdir(parents=True)
        (folder / name / "fragments-00000.safetensors").write_bytes(b"x")
    path = save(tmp_path, 3)
    assert sorted(folder.glob("step-*")) == [path]


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    older = save(tmp_path, 1)
    monkeypatch.setattr(tensor_files, "_write", full)
    with pytest.raises(UserError, match=r"step-00000002 was not written \(rank 0: .*No space left"):
        save(tmp_path, 2)
    assert find_latest(tmp_path) == older
