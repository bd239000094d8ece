"""One step of the run: fetch, train, and tell what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from data_pipelines.document import Batch, SampleKey
from models.objective import effective_rank
from trainer.config import PretrainConfig
from trainer.counts import gather_counts
from trainer.diagnostics import collapse_metrics, loss_metrics
from trainer.gradient_norms import PartNorms
from trainer.guards import Problem
from trainer.loop import Instruments, StepResult, fetch, fill_of, training_step
from trainer.monitor import Monitor
from trainer.state import TrainState, due
from trainer.topology import Topology
from trainer.utilisation import step_rates

MAX_EXPONENT = 80.0
"""Of a perplexity: beyond it JSON has no number."""


@dataclass
class Job:
    """What a step needs. monitor: on rank 0. sources: their names, as documents number them.

    epoch_sizes: samples that an epoch of each source has.
    """

    config: PretrainConfig
    engine: DeepSpeedEngine
    stream: Iterator[Batch]
    state: TrainState
    topology: Topology
    monitor: Monitor | None
    epoch_sizes: dict[str, int]
    norms: PartNorms = field(init=False)
    instruments: Instruments = field(init=False)

    def __post_init__(self) -> None:
        self.norms = PartNorms(self.engine)
        self.instruments = Instruments(norms=self.norms)

    def tell(self, kind: str, step: int, **facts: Any) -> None:
        """An event of the run, which rank 0 records."""
        if self.monitor is not None:
            self.monitor.event(kind, step, **facts)

    @property
    def sources(self) -> list[str]:
        return list(self.epoch_sizes)


def one_step(job: Job, flags: Callable[[], Sequence[bool]] = tuple) -> list[bool]:
    """Fetch, train and record one step. Returns which of the flags, asked once backward is done, any rank has set."""
    config, engine, state, phases = job.config, job.engine, job.state, job.instruments.phases
    start = time.perf_counter()
    phases.step, phases.keys = state.step + 1, []
    with phases("data_wait"):
        batches = fetch(job.stream, engine.gradient_accumulation_steps())
    phases.keys = [row for batch in batches for row in batch.keys]
    result = training_step(engine, batches, state, config, job.topology, flags, job.instruments)
    state.record(batches)
    is_logged = due(state.step, config.monitor.log_every_steps)
    parts, norms = phases.take(is_logged), job.norms.take(is_logged)
    seconds = time.perf_counter() - start
    with phases("record"):
        counts = gather_counts(state, job.topology, job.epoch_sizes) if is_logged else {}
        if result.problem:
            report_problem(job, result.problem, phases.keys)
        if job.monitor is not None:
            rates = {f"lr/{g['name']}": g["lr"] for g in engine.optimizer.param_groups if g["weight_decay"]}
            job.monitor.step(
                state.step,
                config.total_steps,
                {
                    **step_metrics(result, job.sources),
                    **{f"grad_norm/{part}": norm for part, norm in norms.items()},
                    **rates,
                    **fill_of(batches, config.data.max_images_per_row),
                    **step_rates(config.model, batches, result.counts, job.topology, seconds),
                    "seconds/step": seconds,
                    **{f"seconds/{part}": value for part, value in parts.items()},
                    **counts,
                },
            )
    return result.flags


def report_problem(job: Job, problem: Problem, keys: list[list[SampleKey]]) -> None:
    """Tell which step was thrown away, why, and what the rank that shows it was training on. Collective."""
    told: list[Any] = [[list(key) for row in keys for key in row]]
    if job.topology.world_size > 1 and problem.ranks:
        dist.broadcast_object_list(told, src=problem.ranks[0])
    if job.monitor is not None:
        job.monitor.discarded(job.state.step, problem, told[0] if problem.ranks else [])


def step_metrics(result: StepResult, source_names: list[str]) -> dict[str, Any]:
    losses, sample = loss_metrics(result.sums, source_names), result.sums.embedding_sample
    return {
        **losses,
        "perplexity": math.exp(min(losses["loss/text"], MAX_EXPONENT)),
        **collapse_metrics(result.sums),
        "effective_rank": effective_rank(sample) if sample is not None else None,
        "grad_norm": result.grad_norm,
        **asdict(result.counts),
    }
