"""What checkpoints and monitoring cost a run: ``make bench-checkpoint``. One process, a model of 200M parameters.

    stall        a checkpoint in the background, over one that the step waits for: (seconds that the step is blocked +
                 seconds that the steps lose while the files are written) / seconds of the blocking one
    monitoring   seconds of a step spent on metrics, records and the watchdog, over the rest of it

Blocking and background checkpoints are taken in turns, with undisturbed steps before each.
"""

from __future__ import annotations

import trainer  # noqa: F401 # quiets the libraries

# isort: split

import argparse
import itertools
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.step import enough_devices, make_config
from benchmarks.step_corpus import make_corpora
from benchmarks.step_padded import packed, rows_of_lane
from benchmarks.step_ranks import now, run_ranks
from conf import run_cli
from data_pipelines.document import Batch
from data_pipelines.loader import open_indexes
from data_pipelines.tokenizer import Tokenizer
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import PretrainConfig
from trainer.engine import build_engine, init_distributed, set_process_options
from trainer.monitor import Monitor
from trainer.state import TrainState
from trainer.step import Job, one_step
from trainer.watchdog import Watchdog

OUT = Path("outputs/benchmarks/checkpoint")
MODEL = (
    "model=emu_tiny",
    "model.vision={image_size: 224, patch_size: 28, width: 256, num_layers: 2, num_heads: 4, mlp_width: 1024}",
    "model.causal_transformer={num_queries: 32, width: 256, num_layers: 2, num_heads: 4, head_width: 64}",
    "model.causal_transformer.mlp_width=1024",
    "model.language_model={width: 1024, num_layers: 11, num_heads: 16, num_kv_heads: 16, mlp_width: 2816}",
    "data.seq_len=256",
    "data.max_images_per_row=6",
    "data.window_rows=32",
    "monitor.log_every_steps=1",
)
WAITED_AT_MOST = 200
"""Steps, for a checkpoint."""


@dataclass(frozen=True)
class Sizes:
    """What tests make small. steps: undisturbed ones before each checkpoint. turns: many, because the steps of a turn
    differ by as much as a checkpoint costs."""

    turns: int = 9
    steps: int = 5
    model: tuple[str, ...] = MODEL


@dataclass
class Turn:
    """Seconds. blocking: of a checkpoint that the step waits for; blocked, lost: of one in the background."""

    blocking: float
    blocked: float
    lost: float
    steps_meanwhile: int

    @property
    def stall(self) -> float:
        return (self.blocked + self.lost) / self.blocking


@dataclass
class Found:
    num_parameters: int
    num_bytes: int
    turns: list[Turn]
    step_seconds: float
    monitoring: float


def measure(config: PretrainConfig, out: Path, sizes: Sizes) -> Found:
    """On one batch again and again, so that all steps are equally long."""
    set_process_options(config.parallel, config.seed)
    topology = init_distributed(config.parallel)
    run_dir = out / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    indexes = open_indexes(config.data, build_missing=False)
    epoch_sizes = {name: index.num_samples for name, index in indexes.items()}
    engine, monitor = build_engine(config, topology), Monitor(run_dir, config.monitor, asdict(config), 1)
    batches = itertools.repeat(first_batch(config))
    job = Job(config, engine, batches, TrainState(), topology, monitor, epoch_sizes)
    seconds, recorded = list[float](), list[float]()
    with Watchdog(run_dir, run_dir / "hang", topology, job.instruments.phases, 600.0) as watchdog:

        def step() -> float:
            start = now()
            one_step(job)
            watchdog.beat()
            seconds.append(now() - start)
            recorded.append(job.instruments.phases.take(may_wait=True)["record"])
            return seconds[-1]

        step(), step()
        del seconds[:], recorded[:]
        turns, num_bytes = take_turns(job, step, run_dir, sizes)
    monitor.close()
    num_parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    part = statistics.median(a / (b - a) for a, b in zip(recorded, seconds, strict=True))
    return Found(num_parameters, num_bytes, turns, statistics.median(seconds), part)


def first_batch(config: PretrainConfig) -> Batch:
    tokenizer = Tokenizer(config.data.tokenizer)
    return packed([next(rows_of_lane(config))], config, tokenizer)[0]


def take_turns(job: Job, step: Callable[[], float], run_dir: Path, sizes: Sizes) -> tuple[list[Turn], int]:
    """Turns, and bytes of a checkpoint."""
    writer, turns = CheckpointWriter(run_dir, job.topology), list[Turn]()

    def begin() -> float:
        start = now()
        writer.start(job.engine, job.state.step, {}, {})
        return now() - start

    begin()  # makes the host's copies, as the first checkpoint of a run does
    num_bytes = sum(file.stat().st_size for file in writer.finish().iterdir())
    for _ in tqdm(range(sizes.turns), desc="checkpoints, blocking and in the background", unit="turn", disable=None):
        start = now()
        begin()
        writer.finish()
        blocking = now() - start
        usual = statistics.median(step() for _ in range(sizes.steps))
        blocked, meanwhile = begin(), list[float]()
        while writer.is_writing and len(meanwhile) < WAITED_AT_MOST:
            meanwhile.append(step())
        start = now()
        writer.finish()
        blocked += now() - start
        turns.append(Turn(blocking, blocked, sum(meanwhile) - usual * len(meanwhile), len(meanwhile)))
        shutil.rmtree(run_dir / "checkpoints")
    return turns, num_bytes


def run(out: Path, sizes: Sizes) -> None:
    assert enough_devices(1)
    make_corpora(out / "corpora")
    config = make_config(out, 1, *sizes.model, "parallel=zero1" if torch.cuda.is_available() else "parallel=zero0")
    found: Found = run_ranks(measure, 1, config, out, sizes)
    print(f"model of {found.num_parameters / 1e6:.0f}M parameters, checkpoint of {found.num_bytes / 1e9:.2f} GB, "
          f"step of {found.step_seconds:.2f} s")  # fmt: skip
    print(f"{'blocking s':>12}{'blocked s':>12}{'lost s':>12}{'steps':>8}{'stall':>8}")
    for turn in found.turns:
        print(
            f"{turn.blocking:>12.2f}{turn.blocked:>12.2f}{turn.lost:>12.2f}{turn.steps_meanwhile:>8}{turn.stall:>8.2f}"
        )
    stall = statistics.median(turn.stall for turn in found.turns)
    print(f"ratios: stall={stall:.2f} monitoring={found.monitoring:.4f}")


def main() -> None:
    sizes = Sizes()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where corpora and checkpoints are made (%(default)s)")
    parser.add_argument("--turns", type=int, default=sizes.turns, help="checkpoints of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=sizes.steps, help="before each (%(default)s)")
    arguments = parser.parse_args()
    run(arguments.out, Sizes(arguments.turns, arguments.steps))


if __name__ == "__main__":
    run_cli(main)
