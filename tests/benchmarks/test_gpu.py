"""The GPU benchmark in small, on the CPU: padded rows train the same as packed ones, and it runs through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import job, one_document_a_row, step_batches
from models.emu import Emu
from tests.benchmarks.test_step import MODEL, ROWS, out, single_process_group  # noqa: F401 # fixtures
from tests.trainer.tiny_job import run_command
from trainer.loop import model_inputs

pytestmark = pytest.mark.slow

SMALL = [*MODEL, *ROWS, "data.lanes=2", "data.global_batch_rows=2", "data.micro_batch_rows=2", "data.num_workers=0"]


@pytest.mark.usefixtures("single_process_group")
def test_a_row_of_its_own_for_every_document(out: Path) -> None:  # noqa: F811
    """Losses and target counts by source within 1e-5, and less of the rows is used."""
    config = job(out, SMALL)
    packed = next(step_batches(config))[0]
    padded = one_document_a_row(packed)
    model = Emu(config.model, config.objective, len(config.data.sources))
    with torch.no_grad():
        expected, found = (
            model(**model_inputs(batch, torch.device("cpu")), text_scale=1.0, image_scale=1.0)
            for batch in (packed, padded)
        )
    for name in ("text_loss", "text_targets", "image_loss", "image_targets"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert expected["text_targets"].sum() > 50 and expected["image_targets"].sum() > 10
    assert len(padded.input_ids) == sum(map(len, packed.keys))
    assert (padded.document_ids > 0).float().mean() < (packed.document_ids > 0).float().mean()


def test_it_runs_through(out: Path, tmp_path: Path) -> None:  # noqa: F811
    done = run_command("benchmarks.gpu", ["--out", str(out), "--cpu", "--steps", "1", *SMALL], tmp_path)
    assert done.returncode == 0, done.stderr
    loss, *_, ratios = done.stdout.splitlines()
    difference = re.fullmatch(r"text loss: fp32 with sdpa (\S+), bf16 with sdpa \S+, difference (\S+)", loss)
    assert difference is not None and float(difference[2]) < 1e-2 < float(difference[1])
    assert re.fullmatch(r"ratios: vs_padded=\d+\.\d+ utilisation=-", ratios)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would run")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run_command("benchmarks.gpu", [], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: there is no CUDA device: run this on a GPU")
