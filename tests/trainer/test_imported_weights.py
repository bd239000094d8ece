"""From a run's checkpoint to the released layout, back in, and on as the start of another run in another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.weights.fragment_files import read_weights
from tests.trainer.tiny_job import finish, overrides, run_command, start_ranks

pytestmark = pytest.mark.slow

STILL = [f"optim.{part}_lr=0" for part in ("vision_encoder", "causal_transformer", "language_model")]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, corpora: Path, tokenizer_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the folder that its weights became by way of the released layout."""
    folder = tmp_path_factory.mktemp("imported")
    job = overrides(corpora, tokenizer_path, folder / "run", "total_steps=2")
    commands = [
        ("trainer.pretrain", job),
        ("models.weights.export_", ["run/checkpoints/step-00000002", "--layout", "emu", "--out", "emu"]),
        ("models.weights.import_", ["--emu", "emu/pytorch_model.bin", "--out", "start"]),
    ]
    for module, arguments in commands:
        done = run_command(module, arguments, folder, EMU_DATA=str(corpora))
        assert done.returncode == 0, done
    return folder / "run" / "checkpoints" / "step-00000002", folder / "start"


@pytest.mark.parametrize(
    ("world_size", "stage", "tensor", "precision"), [(2, 3, 1, "fp32"), (1, 1, 1, "bf16"), (2, 2, 2, "fp32")]
)
def test_the_start_of_another_run(
    imported: tuple[Path, Path],
    corpora: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    world_size: int,
    stage: int,
    tensor: int,
    precision: str,
) -> None:
    """With learning rates of 0 the run ends with the weights that it began with, to the bit."""
    checkpoint, start = imported
    layout = [f"parallel=zero{stage}", f"parallel.tensor={tensor}", f"parallel.precision={precision}"]
    more = [f"init.weights={start}", "total_steps=1", "seed=1", *STILL, *layout]
    ranks = finish(start_ranks(world_size, overrides(corpora, tokenizer_path, tmp_path / "run", *more), corpora))
    assert [code for code, _ in ranks] == [0] * world_size, ranks
    given, expected = (
        dict(read_weights(tmp_path / "run" / "checkpoints" / "step-00000001")),
        dict(read_weights(checkpoint)),
    )
    assert given.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in given.items())


def test_weights_of_another_size_are_refused(
    imported: tuple[Path, Path], corpora: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    more = [f"init.weights={imported[1]}", "model.language_model.mlp_width=64"]
    job = overrides(corpora, tokenizer_path, tmp_path / "run", *more)
    done = run_command("trainer.pretrain", job, tmp_path, EMU_DATA=str(corpora))
    assert done.returncode == 2
    assert done.stderr.endswith("weights of a model with other settings: add model.language_model.mlp_width=48\n")
    missing = run_command("trainer.pretrain", [*job, "init.weights=nowhere"], tmp_path, EMU_DATA=str(corpora))
    assert missing.returncode == 2 and "init.weights=nowhere is no folder of imported weights" in missing.stderr
