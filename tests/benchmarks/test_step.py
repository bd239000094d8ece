"""The step benchmark in small: packed and padded rows train the same, it counts what it says, and it runs through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from benchmarks import data_corpora, step, step_corpus, step_padded
from benchmarks.step import Sizes
from data_pipelines.tokenizer import Tokenizer
from models.emu import Emu
from trainer.config import PretrainConfig

pytestmark = pytest.mark.slow

NUM_QUERIES, NUM_ROWS = 3, 3
MODEL = (
    "model=emu_tiny",
    "model.vision={image_size: 8, patch_size: 4, width: 16, num_layers: 2, num_heads: 2, mlp_width: 24}",
    "model.causal_transformer={num_queries: 3, width: 16, num_layers: 2, num_heads: 2, head_width: 8, mlp_width: 24}",
    "model.language_model={width: 32, num_layers: 2, num_heads: 4, num_kv_heads: 4, mlp_width: 48}",
)
ROWS = ("data.seq_len=256", "data.max_images_per_row=48", "data.window_rows=8")
SIZES = Sizes(
    turns=1,
    rows=NUM_ROWS,
    loop_turns=1,
    vision_turns=1,
    model=MODEL,
    long_rows=ROWS,
    short_rows=ROWS,
    vision=(*MODEL, *ROWS),
)


@pytest.fixture(scope="module")
def single_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_corpora, "CLIP_FRAMES", 10)
        patch.setattr(step_corpus, "NUM_CLIPS", 2)
        patch.setattr(step_corpus, "SETS", {name: (1, 16, make) for name, (_, _, make) in step_corpus.SETS.items()})
        step_corpus.make_corpora(folder / "corpora")
    return folder


def gradients_and_counts(config: PretrainConfig) -> dict[str, tuple]:
    """By contender: losses, gradients by name, and its counts: useful tokens, text targets, images, positions."""
    torch.manual_seed(0)
    model, tokenizer = Emu(config.model, config.objective, 5), Tokenizer(config.data.tokenizer)
    stream = step_padded.rows_of_lane(config)
    rows = [next(stream) for _ in range(NUM_ROWS)]
    found = {}
    for name, lay_out, contender in (
        ("packed", step_padded.packed, step_padded.PackedLanguageModel(model)),
        ("padded", step_padded.padded, step_padded.PaddedLanguageModel(model)),
    ):
        work = step_padded.prepare(lay_out(rows, config, tokenizer), config, torch.device("cpu"))
        losses = step_padded.run_pass(model, work, contender)
        gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
        counts = work.useful_tokens, work.num_text, work.num_images, work.num_positions
        found[name] = losses, gradients, counts
    tokens = [int(token) for row in rows for document in row.documents for token in document.input_ids[1:]]
    longest = [len(row.documents) for row in rows]
    found["expected"] = sum(t < config.model.language_model.text_vocab_size for t in tokens), longest
    return found


@pytest.mark.usefixtures("single_process_group")
def test_packed_and_padded_rows_give_the_same_losses_and_gradients(out: Path) -> None:
    """Relative to the largest gradient of a parameter: 1e-4. Both count the same useful tokens."""
    found = gradients_and_counts(step.make_config(out, 1, *MODEL, *ROWS))
    (ours, our_gradients, our_counts), (theirs, their_gradients, their_counts) = found["packed"], found["padded"]
    step_padded.assert_same_losses(ours, theirs, 1e-5)
    assert ours.text > 0 and ours.image > 0
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(
            gradient,
            their_gradients[name],
            rtol=0,
            atol=1e-4 * float(gradient.abs().max()),
            msg=lambda m, n=name: n + m,
        )
    assert our_counts[:3] == their_counts[:3]
    num_text, documents = found["expected"]
    assert our_counts[1] == num_text
    assert our_counts[0] == num_text + NUM_QUERIES * our_counts[2]
    assert our_counts[3] == NUM_ROWS * 256 and their_counts[3] != our_counts[3]
    assert sum(documents) > NUM_ROWS


def test_other_losses_are_an_error() -> None:
    ours = step_padded.Pass(text=100.0, image=10.0)
    with pytest.raises(AssertionError, match="image losses"):
        step_padded.assert_same_losses(ours, step_padded.Pass(text=100.0, image=10.01), 1e-4)


def test_it_runs_through(out: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_DATA", "")
    step.run(out, SIZES)
    lines = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"ratios: vs_padded=\d+\.\d\d loop_overhead=\d+\.\d{3} tp_vision=\d+\.\d\d", lines[-1])
    assert sum(line.startswith("whole step, ") for line in lines) == 2
