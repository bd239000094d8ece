"""How fast a training step is: ``make bench-step``. Three comparisons, each in turns within one run, on the same cores:

    vs_padded      the language model's part of a step on packed rows, against the same documents of the same mixture in
                   padded batches of one source (transformers' LLaMA, logits at every position)
    loop_overhead  the whole step, loader and records and all, over the bare forward, backward and optimizer: in one
                   process, and over the bare DeepSpeed engine with 2 processes at ZeRO-3; the larger counts
    tp_vision      the vision part of 2 tensor-parallel ranks, against encoding every image on both

Ratios are medians of the ratios of the turns. The language model has 8 layers of 1,024 and a vocabulary of 32,000.
"""

from __future__ import annotations

import trainer  # noqa: F401 # quiets the libraries

# isort: split

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.step_corpus import make_corpora
from benchmarks.step_loop import measure_loop
from benchmarks.step_padded import Turn, batch_size, compare
from benchmarks.step_ranks import run_ranks
from benchmarks.step_vision import measure_vision
from conf import run_cli
from data_pipelines.loader import open_indexes
from trainer.config import PretrainConfig, compose_config, fill_vocabulary

OUT = Path("outputs/benchmarks/step")
NUM_RANKS = 2
MODEL = (
    "model=emu_tiny",
    "model.vision={image_size: 224, patch_size: 28, width: 256, num_layers: 4, num_heads: 4, mlp_width: 1024}",
    "model.causal_transformer={num_queries: 32, width: 256, num_layers: 2, num_heads: 4, head_width: 64}",
    "model.causal_transformer.mlp_width=1024",
    "model.language_model={width: 1024, num_layers: 8, num_heads: 16, num_kv_heads: 16, mlp_width: 2816}",
    "model.language_model.init_std=0.02",
)
"""The vision part is small: it is the same for packed and for padded rows."""
LONG_ROWS = ("data.seq_len=2048",)
SHORT_ROWS = ("data.seq_len=1024", "data.max_images_per_row=24")
"""Of a step that the loop's own costs fall upon: one row a process, less than any real step has."""

VISION = (
    "model=emu_tiny",
    "model.vision={image_size: 224, patch_size: 14, width: 512, num_layers: 6, num_heads: 8, mlp_width: 2048}",
    "model.causal_transformer={num_queries: 32, width: 512, num_layers: 4, num_heads: 8, head_width: 64}",
    "model.causal_transformer.mlp_width=2048",
)
"""Of the vision part under tensor parallelism, in rows of the default shape."""


@dataclass(frozen=True)
class Sizes:
    """What tests make small. turns: of packed and padded rows; rows: packed rows of such a turn."""

    turns: int = 2
    rows: int = 4
    loop_turns: int = 9
    vision_turns: int = 3
    model: tuple[str, ...] = MODEL
    long_rows: tuple[str, ...] = LONG_ROWS
    short_rows: tuple[str, ...] = SHORT_ROWS
    vision: tuple[str, ...] = VISION


def make_config(out: Path, num_ranks: int, *overrides: str) -> PretrainConfig:
    """A training job on the corpora under `out`, a lane and a row of the step for each rank."""
    os.environ["EMU_DATA"] = str(out / "corpora")
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    config = compose_config(
        [
            "data=corpora",
            f"data.index_dir={out / 'index'}",
            f"data.lanes={num_ranks}",
            f"data.global_batch_rows={num_ranks}",
            "data.num_workers=1",
            "optim.schedule=constant",
            "monitor.wandb=disabled",
            f"parallel.precision={precision}",
            *overrides,
        ]
    )
    fill_vocabulary(config)
    open_indexes(config.data, build_missing=True)
    return config


def enough_devices(num_ranks: int) -> bool:
    """On CPU any number of processes shares the cores; a GPU takes one."""
    return not torch.cuda.is_available() or torch.cuda.device_count() >= num_ranks


def measure_padded(out: Path, sizes: Sizes) -> float:
    config = make_config(out, 1, *sizes.model, *sizes.long_rows)
    print(f"{sizes.turns} turns of {sizes.rows} packed rows and of their documents in padded batches", flush=True)
    return report_padded(config, run_ranks(compare, 1, config, sizes.turns, sizes.rows))


def report_padded(config: PretrainConfig, turns: Sequence[Turn]) -> float:
    print("useful tokens (text targets and image slots) a second")
    print(f"{'':<24}{'packed':>10}{'padded':>10}{'ratio':>8}")
    parts = {
        "language-model part": [(turn.ours.language, turn.theirs.language) for turn in turns],
        "whole step": [turn.whole for turn in turns],
    }
    ratios = {}
    for name, seconds in parts.items():
        rates = [(turn.useful_tokens / a, turn.useful_tokens / b) for turn, (a, b) in zip(turns, seconds, strict=True)]
        ours, theirs = (statistics.median(side) for side in zip(*rates, strict=True))
        ratios[name] = statistics.median(b / a for a, b in seconds)
        print(f"{name:<24}{ours:>10.1f}{theirs:>10.1f}{ratios[name]:>8.2f}")
    useful = sum(turn.useful_tokens for turn in turns)
    positions = sum(turn.our_positions for turn in turns), sum(turn.their_positions for turn in turns)
    print(
        f"positions for {useful} useful tokens: {positions[0]} in rows of {config.data.seq_len}, {positions[1]} padded"
    )
    sizes = ", ".join(f"{batch_size(config.data, name)} {name}" for name in config.data.sources)
    print(f"padded batches: {sizes}; losses equal", flush=True)
    return ratios["language-model part"]


def measure_loops(out: Path, sizes: Sizes) -> float:
    """The larger of the two overheads."""
    overheads = []
    for num_ranks, zero_stage, name in (
        (1, 0, "one process, over torch alone"),
        (NUM_RANKS, 3, f"{NUM_RANKS} processes at ZeRO-3, over the bare engine"),
    ):
        if not enough_devices(num_ranks):
            continue
        config = make_config(out, num_ranks, *sizes.model, *sizes.short_rows, f"parallel=zero{zero_stage}")
        seconds = run_ranks(measure_loop, num_ranks, config, sizes.loop_turns)
        ours, bare = (statistics.median(side) for side in zip(*seconds, strict=True))
        overheads.append(statistics.median(a / b for a, b in seconds))
        print(f"whole step, {name}: {ours:.2f} s over {bare:.2f} s, ratio {overheads[-1]:.3f}", flush=True)
    return max(overheads)


def measure_tp_vision(out: Path, sizes: Sizes) -> float:
    config = make_config(out, 1, *sizes.vision, f"parallel.tensor={NUM_RANKS}")
    seconds = run_ranks(measure_vision, NUM_RANKS, config, sizes.vision_turns)
    ours, repeated = (statistics.median(side) for side in zip(*seconds, strict=True))
    ratio = statistics.median(b / a for a, b in seconds)
    print(
        f"vision part of a row, tp={NUM_RANKS}: {ours:.2f} s, every image on every rank: {repeated:.2f} s, {ratio:.2f}"
    )
    return ratio


def run(out: Path, sizes: Sizes) -> None:
    make_corpora(out / "corpora")
    vs_padded = measure_padded(out, sizes)
    loop_overhead = measure_loops(out, sizes)
    tp_vision = f"{measure_tp_vision(out, sizes):.2f}" if enough_devices(NUM_RANKS) else "-"
    print(f"ratios: vs_padded={vs_padded:.2f} loop_overhead={loop_overhead:.3f} tp_vision={tp_vision}")


def main() -> None:
    sizes = Sizes()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where corpora and indexes are made (%(default)s)")
    parser.add_argument("--turns", type=int, default=sizes.turns, help="of packed and padded rows (%(default)s)")
    parser.add_argument("--rows", type=int, default=sizes.rows, help="packed rows of a turn (%(default)s)")
    parser.add_argument("--loop-turns", type=int, default=sizes.loop_turns, help="of the loop (%(default)s)")
    arguments = parser.parse_args()
    run(arguments.out, Sizes(arguments.turns, arguments.rows, arguments.loop_turns))


if __name__ == "__main__":
    run_cli(main)
