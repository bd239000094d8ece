"""The demo's plan and how it treats folders and failures; the demo itself is `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo import run
from benchmarks.demo.run import DEFAULT_OUT, Stage, forget_last_steps, make_plan, make_stages, run_stage, start_anew
from conf import UserError
from trainer import run_folder
from trainer.config import compose_config


def test_the_interruption_lies_half_way_behind_a_checkpoint() -> None:
    plan = make_plan(DEFAULT_OUT, ["total_steps=700", "checkpoint.every_steps=100"])
    assert (plan.checkpoint, plan.stop) == (400, 405)
    assert compose_config(plan.overrides).checkpoint.permanent_every_steps == 405


def test_no_room_for_an_interruption_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"total_steps=20 and checkpoint.every_steps=100 leave no checkpoint"):
        make_plan(DEFAULT_OUT, ["total_steps=20", "checkpoint.every_steps=100"])


def test_everything_moves_with_out(tmp_path: Path) -> None:
    overrides = make_plan(tmp_path, []).overrides
    config = compose_config(overrides)
    paths = [config.run_dir, config.init.vision_encoder, config.data.tokenizer, config.data.index_dir]
    paths += [source.shards for source in config.data.sources.values()]
    assert all(path.startswith(f"{tmp_path}/") for path in paths)
    assert config.data.sources["laion"].shards == f"{tmp_path}/corpora/laion/*.tar"


def test_both_attempts_are_the_same_command_but_for_the_stop() -> None:
    stages = {stage.name: stage for stage in make_stages(make_plan(DEFAULT_OUT, []))}
    first, second = stages["pretrain_1"].command, stages["pretrain_2"].command
    assert first[:-1] == second
    assert first[-1].startswith("stop_after_step=")


def test_after_the_stop_the_run_looks_as_if_it_had_been_killed(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, ["total_steps=20", "checkpoint.every_steps=10"])
    for step in (plan.checkpoint, plan.stop):
        plan.checkpoint_folder(step).mkdir(parents=True)
    forget_last_steps(plan)
    assert plan.set_aside.is_dir()
    checkpoints = plan.run_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000010"]
    assert (checkpoints / "latest").read_text() == "step-00000010\n"


def test_a_second_demo_keeps_the_corpora_alone(tmp_path: Path) -> None:
    start_anew(tmp_path)
    for name in ("corpora", "run", "predictions", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "report.html").touch()
    start_anew(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpora", "mine", "stages.json"]


def test_a_run_of_someone_else_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="was not made by this command"):
        start_anew(tmp_path)


def test_a_run_in_use_is_not_removed(tmp_path: Path) -> None:
    start_anew(tmp_path)
    with run_folder.claim(tmp_path / "run"), pytest.raises(UserError, match="is in use"):
        start_anew(tmp_path)


def test_keep_runs_only_what_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path, [])
    (tmp_path / "vision_encoder.safetensors").touch()
    plan.set_aside.mkdir(parents=True)
    plan.checkpoint_folder(plan.total_steps).mkdir(parents=True)
    (tmp_path / "stages.json").write_text('{"pretrain_1": 7.0}')
    ran: list[str] = []
    monkeypatch.setattr(run, "run_stage", lambda stage, logs: float(ran.append(stage.name) or len(ran)))
    monkeypatch.setattr(run, "write_resume_check", lambda plan: ran.append("resume check"))
    run.run_stages(plan, keep=True)
    assert ran == ["corpora", "resume check", "export", "predict", "check", "report"]
    seconds = json.loads((tmp_path / "stages.json").read_text())
    assert seconds == {"pretrain_1": 7.0, "corpora": 1, "export": 3, "predict": 4, "check": 5, "report": 6}


def test_output_is_shown_and_kept(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    program = "import sys; print('out'); print('10%\\r20%', file=sys.stderr)"
    assert run_stage(Stage("demo", "Demo", ["-c", program]), tmp_path / "logs") >= 0
    assert (tmp_path / "logs/demo.log").read_bytes() == b"out\n10%\r20%\n"
    assert b"out\n10%\r20%\n" in capfdbinary.readouterr().out


def test_a_failing_stage_ends_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the stage 'Demo' failed with code 3: read the end of .*demo.log"):
        run_stage(Stage("demo", "Demo", ["-c", "raise SystemExit(3)"]), tmp_path / "logs")
