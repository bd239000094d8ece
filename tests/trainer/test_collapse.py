"""Collapse is made to happen, and seen: all pictures get one embedding, and the regression loss looks excellent."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.data_pipelines.corpora import write_tar
from tests.trainer.tiny_job import history, overrides, run_command

pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "small": (240, 240, 240)}
PLACES = {"left": slice(0, 4), "above": slice(2, 6), "under": slice(4, 8)}
LEARNING_RATES = ("vision_encoder_lr", "causal_transformer_lr", "language_model_lr")


def write_squares(folder: Path) -> Path:
    """Squares of four colours in nine places on two backgrounds, with captions that tell them apart."""
    (folder / "laion").mkdir(parents=True)
    samples = []
    for number, (colour, across, down, dark) in enumerate(itertools.product(COLOURS, PLACES, PLACES, (0, 1))):
        pixels = np.full((8, 8, 3), 20 if dark else 120, np.uint8)
        pixels[PLACES[down], PLACES[across]] = COLOURS[colour]
        stream = io.BytesIO()
        PIL.Image.fromarray(pixels).save(stream, "PNG")
        caption = f"{colour} square {across} {down} {'big' if dark else 'the'}"
        samples.append({"__key__": f"{number:04d}", "png": stream.getvalue(), "txt": caption})
    write_tar(folder / "laion" / "00000.tar", samples)
    return folder


def train(folder: Path, tokenizer: Path, run_dir: Path, lr: float, *more: str) -> subprocess.CompletedProcess[str]:
    rates = [f"optim.{name}={lr}" for name in LEARNING_RATES]
    job = overrides(folder, tokenizer, run_dir, "data.sources.mmc4.weight=0", *rates, "optim.schedule=constant", *more)
    done = run_command("trainer.pretrain", job, folder, EMU_DATA=str(folder))
    assert done.returncode == 0, done.stderr
    return done


def alarms(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "collapse"]


def test_both_losses_from_random_weights_at_a_high_rate_collapse_with_one_alarm(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    folder, run_dir = write_squares(tmp_path / "data"), tmp_path / "run"
    done = train(folder, tokenizer_path, run_dir, 2e-2, "objective=paper", "total_steps=80", "seed=1")
    first, *_, last = history(run_dir)
    # What misleads: the regression loss has fallen more than fiftyfold.
    assert last["loss/image"] < first["loss/image"] / 50
    # What tells: the pictures' embeddings are alike, and predicting their mean would do better.
    assert first["embedding_spread"] > 0.5 and last["embedding_spread"] < 0.02
    assert last["explained_variance_first"] < 0 and last["explained_variance_later"] < 0
    (alarm,) = alarms(run_dir)
    assert alarm["embedding_spread"] < 0.02 and alarm["step"] < 40
    assert done.stderr.count("collapse alarm") == 1
    assert f"step {alarm['step']}: collapse alarm" in done.stderr


def test_the_options_for_random_weights_do_not_collapse(tmp_path: Path, tokenizer_path: Path) -> None:
    folder, run_dir = write_squares(tmp_path / "data"), tmp_path / "run"
    delay = ("objective.image_weight_delay_steps=20", "objective.image_weight_warmup_steps=10")
    done = train(folder, tokenizer_path, run_dir, 3e-3, "objective=from_scratch", "total_steps=70", *delay)
    records = history(run_dir)
    assert min(record["embedding_spread"] for record in records) > 0.2
    assert records[-1]["explained_variance_later"] > 0.5
    assert records[-1]["loss/text"] < records[0]["loss/text"] / 3
    assert alarms(run_dir) == []
    assert "collapse" not in done.stderr
