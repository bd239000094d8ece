"""Bad steps in a row are thrown away; enough of them bring earlier weights back, and the data since are passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_distributed
from tests.trainer.conftest import corpora, tokenizer_path  # noqa: F401 # fixtures
from tests.trainer.tiny_job import environment, overrides

pytestmark = pytest.mark.slow

NUM_STEPS = 9
SETTINGS = [
    f"total_steps={NUM_STEPS}",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
    "guard.history_steps=2",
    "parallel.persistence_threshold=0",
]
STAGES = range(4)


def train(overrides_: list[str], bad_steps: tuple[int, ...], kind: str) -> tuple[int | str, list[dict[str, Any]]]:
    """How it ended, its code or in an error the sentence of exit.json, and its events.

    kind: what rank 1's loss (nan) or every rank's (spike) is in the bad steps.
    """
    import torch
    import torch.distributed as dist

    from conf import UserError
    from models.emu import Emu
    from trainer import pretrain, run_folder
    from trainer.config import compose_config

    config, at = compose_config(overrides_), {"step": 0}
    original, one_step = Emu.forward, pretrain.one_step

    def forward(self: Emu, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        outputs = original(self, *args, **kwargs)
        if at["step"] in bad_steps:
            if kind == "spike":
                outputs["text_loss"] = outputs["text_loss"] * 100
            elif dist.get_rank() == 1:
                outputs["loss"], outputs["text_loss"] = outputs["loss"] * float("nan"), outputs["text_loss"] / 0
        return outputs

    def watched(job: Any, flags: Any = tuple) -> Any:
        at["step"] = job.state.step + 1
        return one_step(job, flags)

    Emu.forward, pretrain.one_step = forward, watched  # type: ignore[method-assign]
    try:
        end: int | str = pretrain.train(config)
    except (UserError, SystemExit):
        end = ""
    finally:
        Emu.forward, pretrain.one_step = original, one_step  # type: ignore[method-assign]
        run_folder.release()
        dist.barrier()
    if end == "":  # another rank may have been the one to say why
        end = json.loads(Path(config.run_dir, "exit.json").read_text())["reason"]
    lines = Path(config.run_dir, "events.jsonl").read_text().splitlines()
    return end, [json.loads(line) for line in lines]


def run_all(folder: Path, tokenizer: Path, out: Path) -> dict[str, Any]:
    import logging
    import os

    logging.disable(logging.WARNING)
    from trainer import pretrain
    from trainer.config import ParallelConfig

    os.environ.update(environment(EMU_DATA=str(folder)))
    topology = pretrain.init_distributed(ParallelConfig(timeout_minutes=1))
    pretrain.init_distributed = lambda _: topology

    def job(name: str, kind: str, bad_steps: tuple[int, ...], *more: str) -> Any:
        return train(overrides(folder, tokenizer, out / name, *SETTINGS, *more), bad_steps, kind)

    found = {}
    for stage in STAGES:
        zero = f"parallel.zero_stage={stage}"
        found[f"thrown away, ZeRO-{stage}"] = job(f"only-{stage}", "spike", (5, 6), zero, "guard.patience=9")
        found[f"rolled back, ZeRO-{stage}"] = job(f"back-{stage}", "spike", (5, 6), zero, "guard.patience=2")
    found["not a number"] = job("nan", "nan", (4,))
    found["a checkpoint among them"] = job("among", "spike", (6, 7), "guard.patience=2")
    found["no checkpoint"] = job("none", "nan", (1, 2), "guard.patience=2")
    found["no help"] = job("no-help", "nan", (3, 4, 7, 8), "guard.patience=2", "guard.max_rollbacks=1")
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpora: Path, tokenizer_path: Path) -> tuple[Path, dict[str, Any]]:  # noqa: F811
    out = tmp_path_factory.mktemp("guards")
    return out, run_distributed(run_all, 2, corpora, tokenizer_path, out, init_group=False, timeout_s=600.0)[0]


def told(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def fragments(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("fragments-*")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_rollback_brings_the_checkpoint_back(runs: tuple[Path, dict[str, Any]], stage: int) -> None:
    """The checkpoint is of the step before the first bad one. As bad steps change nothing, going back to it must give
    the weights and moments of a run that only throws them away, bit for bit."""
    out, found = runs
    end, events = found[f"rolled back, ZeRO-{stage}"]
    assert end == 0
    assert [event["step"] for event in told(events, "step_discarded")] == [5, 6]
    assert all(event["reason"].startswith("text loss jumped from ") for event in told(events, "step_discarded"))
    assert [(e["step"], e["to_step"], e["passed_over"]) for e in told(events, "rollback")] == [(6, 4, [5, 6])]
    assert told(found[f"thrown away, ZeRO-{stage}"][1], "rollback") == []
    back, only = fragments(out / f"back-{stage}"), fragments(out / f"only-{stage}")
    assert back and back == only


def test_a_rank_with_a_loss_that_is_not_a_number_is_named(runs: tuple[Path, dict[str, Any]]) -> None:
    end, events = runs[1]["not a number"]
    assert end == 0
    (event,) = told(events, "step_discarded")
    assert (event["step"], event["ranks"], event["reason"]) == (4, [1], "loss is not a number")
    assert {source for source, _, _ in event["keys"]} <= {"laion", "mmc4"} and event["keys"]


def test_a_checkpoint_among_the_bad_steps_is_not_gone_back_to(runs: tuple[Path, dict[str, Any]]) -> None:
    end, events = runs[1]["a checkpoint among them"]
    assert end == 0
    assert [(e["to_step"], e["passed_over"]) for e in told(events, "rollback")] == [(4, [5, 7])]


def test_without_an_earlier_checkpoint_the_run_ends(runs: tuple[Path, dict[str, Any]]) -> None:
    end, _ = runs[1]["no checkpoint"]
    assert str(end).startswith("steps 1 to 2 were no good and there is no checkpoint from before them: look at events")


def test_rollbacks_that_do_not_help_end_the_run(runs: tuple[Path, dict[str, Any]]) -> None:
    end, events = runs[1]["no help"]
    assert [event["passed_over"] for event in told(events, "rollback")] == [[3, 4]]
    assert str(end).startswith("steps 7 to 8 were no good, and the rollbacks that guard.max_rollbacks=1 allows")
