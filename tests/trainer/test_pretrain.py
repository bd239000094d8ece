"""The command line from start to finish: what is in the run folder, on the console, and in wandb."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from conf.ports import free_port
from tests.trainer.tiny_job import REPOSITORY, TIMEOUT_S, environment, history, overrides, run_command
from tests.trainer.wandb_files import read_records
from trainer.checkpoint_folder import find_damage
from trainer.config import OptimConfig, compose_config
from trainer.monitor import flat, read_metrics
from trainer.schedule import lr_factor

pytestmark = pytest.mark.slow

NUM_STEPS, STOP_AFTER, NUM_ROWS, SEQ_LEN = 8, 4, 8, 64


@pytest.fixture(scope="module")
def attempts(
    tmp_path_factory: pytest.TempPathFactory, corpora: Path, tokenizer_path: Path
) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """A run folder, and two command lines that made it: stopped after half of the steps, and gone on."""
    run_dir = tmp_path_factory.mktemp("pretrain") / "run"
    job = overrides(corpora, tokenizer_path, run_dir, "monitor.wandb=offline", "checkpoint.every_steps=3")
    done = [
        run_command("trainer.pretrain", [*job, *more], run_dir.parent, EMU_DATA=str(corpora))
        for more in ([f"stop_after_step={STOP_AFTER}"], [])
    ]
    assert [process.returncode for process in done] == [0, 0], done
    return run_dir, done


@pytest.fixture(scope="module")
def run_dir(attempts: tuple[Path, list[Any]]) -> Path:
    return attempts[0]


def test_every_step_has_every_figure(run_dir: Path) -> None:
    records = read_metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    assert [record["attempt"] for record in records] == [1] * STOP_AFTER + [2] * (NUM_STEPS - STOP_AFTER)
    wanted = {
        *("loss/text", "loss/image", "loss/text/laion", "loss/text/mmc4", "loss/image/laion"),
        *("targets/text/laion", "targets/text/mmc4", "targets/image/laion"),
        *("text_targets", "image_targets", "tokens", "images", "samples", "skips", "digest"),
        *("seconds/step", "seconds/data_wait", "token_fill", "image_fill", "grad_norm"),
        *("lr/vision_encoder", "lr/causal_transformer", "lr/language_model"),
        *("embedding_spread", "embedding_rms", "embedding_std_per_slot", "effective_rank"),
        *("explained_variance_first", "explained_variance_later", "perplexity", "time", "memory/host_gb"),
        *(f"grad_norm/{part}" for part in ("vision_encoder", "causal_transformer", "language_model")),
        *(f"seconds/{part}" for part in ("prepare", "forward", "backward", "agree", "optimizer")),
        *("tokens_per_second", "images_per_second", "flops_per_second"),
        *("mixture/laion", "mixture/mmc4", "epoch/laion", "epoch/mmc4"),
    }
    for record in records:
        # A step of text alone or of a single picture has no figures of pictures.
        assert wanted - record.keys() <= {name for name in wanted if "image" in name or "explained" in name}
    assert any(wanted <= record.keys() for record in records)


def test_the_figures_of_a_step_agree_with_each_other(run_dir: Path) -> None:
    for record in read_metrics(run_dir):
        assert record["tokens"] == pytest.approx(record["token_fill"] * NUM_ROWS * SEQ_LEN)
        assert 0 <= record["seconds/data_wait"] <= record["seconds/step"]
        parts = ("data_wait", "prepare", "forward", "backward", "agree", "optimizer")
        assert sum(record[f"seconds/{part}"] for part in parts) == pytest.approx(record["seconds/step"], rel=0.1)
        squares = [value**2 for name, value in record.items() if name.startswith("grad_norm/")]
        assert sum(squares) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(record["loss/text"]))
        assert sum(value for name, value in record.items() if name.startswith("mixture/")) == pytest.approx(1)
        for modality in ("text", "image"):
            sources = [name for name in record if name.startswith(f"targets/{modality}/")]
            targets = {name: record[name] for name in sources}
            assert sum(targets.values()) == record[f"{modality}_targets"]
            total = sum(record[name.replace("targets", "loss")] * count for name, count in targets.items())
            assert record[f"loss/{modality}"] == pytest.approx(total / max(1, record[f"{modality}_targets"]))
        factor = lr_factor(record["step"] - 1, NUM_STEPS, OptimConfig())
        assert record["lr/vision_encoder"] == pytest.approx(4e-5 * factor)
        assert record["lr/language_model"] == pytest.approx(3e-5 * factor)


def test_samples_and_skips_are_counted_over_attempts(run_dir: Path) -> None:
    records = read_metrics(run_dir)
    for name in ("samples", "skips"):
        for before, after in itertools.pairwise(records):
            assert all(after[name][key] >= count for key, count in before[name].items())
    assert records[-1]["skips"].keys() <= {
        "laion: empty caption",
        "laion: held out",
        "laion: image does not decode",
    }


def test_the_run_folder_is_the_one_of_the_readme(run_dir: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "exit.json", "attempt", "lock", "pids", "wandb"):
        assert (run_dir / name).exists() and name in readme, name
    saved = OmegaConf.load(run_dir / "config.yaml")
    assert saved.run_dir == str(run_dir) and saved.model.language_model.text_vocab_size == 360
    assert (run_dir / "attempt").read_text() == "2\n"
    assert json.loads((run_dir / "exit.json").read_text()) == {
        "code": 0,
        "reason": f"trained from step {STOP_AFTER} to {NUM_STEPS} of {NUM_STEPS}",
    }
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    told = [(event["event"], event["attempt"], event["step"]) for event in events]
    assert [event for event in told if event[0] == "start"] == [("start", 1, 0), ("start", 2, STOP_AFTER)]
    assert ("checkpoint", 1, STOP_AFTER) in told and {kind for kind, _, _ in told} == {"start", "checkpoint", "stop"}


def test_checkpoints_are_whole_and_the_oldest_are_gone(run_dir: Path) -> None:
    """Every 3 steps and at each end: 3, 4, 6, 8. Two are kept."""
    folder = run_dir / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"latest", "step-00000006", "step-00000008"}
    assert (folder / "latest").read_text() == "step-00000008\n"
    assert [find_damage(path) for path in sorted(folder.glob("step-*"))] == [None, None]


def test_the_console_says_what_happens_and_nothing_else(attempts: tuple[Path, list[Any]]) -> None:
    run_dir, processes = attempts
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number, (process, first, last) in enumerate(
        zip(processes, (0, STOP_AFTER), (STOP_AFTER, NUM_STEPS), strict=True), start=1
    ):
        lines = process.stdout.splitlines()
        assert lines[0] == f"attempt {number}: from step {first} of {NUM_STEPS} on 1 x {device}"
        assert [line.split("  ")[0] for line in lines[1:-1]] == [
            f"step {step}/{NUM_STEPS}" for step in range(first + 1, last + 1)
        ]
        assert lines[-1] == (
            f"trained from step {first} to {last} of {NUM_STEPS}; run folder {run_dir}; "
            f"next: python -m trainer.export run_dir={run_dir}"
        )
        warned = [line.partition(",")[0] for line in process.stderr.splitlines()]
        assert warned == ["all weights start at random"] * (number == 1) or device == "cuda"


def test_wandb_is_offline_and_one_run(run_dir: Path) -> None:
    run_id = (run_dir / "wandb_id").read_text().strip()
    runs = [path.name for path in (run_dir / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(name.endswith(run_id) for name in runs)
    assert all(list((run_dir / "wandb" / name).glob("*.wandb")) for name in runs)


def test_a_finished_run_started_again_does_nothing(
    run_dir: Path, corpora: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    job = overrides(corpora, tokenizer_path, run_dir, "checkpoint.every_steps=3")
    before = history(run_dir)
    done = run_command("trainer.pretrain", job, tmp_path, EMU_DATA=str(corpora))
    assert done.returncode == 0 and f"trained from step {NUM_STEPS} to {NUM_STEPS}" in done.stdout
    assert history(run_dir) == before


def test_the_bare_deepspeed_launcher(run_dir: Path, corpora: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """`deepspeed --num_gpus 2 trainer/pretrain.py`, which adds --local_rank: the samples of the run by one process."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", f"--master_port={free_port()}"]
    job = overrides(corpora, tokenizer_path, tmp_path / "run", "parallel.zero_stage=3")
    done = subprocess.run(
        [*launcher, "trainer/pretrain.py", *job],
        env=environment(EMU_DATA=str(corpora)),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained from step 0 to 8 of 8") == 1
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    two, one = history(tmp_path / "run"), history(run_dir)
    for name in ("digest", "tokens", "images", "samples", "skips"):
        assert [record[name] for record in two] == [record[name] for record in one]
    for name in ("loss/text", "loss/image"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], abs=1e-5)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0


def test_the_job_of_the_tests_is_what_they_say(corpora: Path, tokenizer_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMU_DATA", str(corpora))
        config = compose_config(overrides(corpora, tokenizer_path, Path("run")))
    assert (config.total_steps, config.data.global_batch_rows, config.data.seq_len) == (NUM_STEPS, NUM_ROWS, SEQ_LEN)
    assert config.optim == OptimConfig()


def test_wandb_has_every_figure_of_every_step(run_dir: Path) -> None:
    """Read back from the files that `wandb sync --append` would send: one run id in all segments."""
    records = {record["step"]: record for record in read_metrics(run_dir)}
    seen: dict[int, set[str]] = {}
    ids = set()
    for file in (run_dir / "wandb").glob("offline-run-*/*.wandb"):
        for record in read_records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                seen[int(items["_step"])] = set(items)
    assert ids == {(run_dir / "wandb_id").read_text().strip()}
    assert seen.keys() == records.keys()
    for step, figures in records.items():
        assert set(flat(figures)) - {"attempt", "step", "time"} <= seen[step]
