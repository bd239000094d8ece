"""What the training loop costs: its whole step over the bare forward, backward and optimizer on the same batches.

The whole step is the trainer's own: rows from loader workers, counts over the ranks, statistics, metrics.jsonl.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from tqdm import tqdm

from benchmarks.step_ranks import now
from data_pipelines.document import Batch
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.tokenizer import Tokenizer
from models.emu import Emu
from trainer.config import PretrainConfig
from trainer.engine import build_engine, init_distributed, parameter_groups, set_process_options
from trainer.loop import count_step, model_inputs
from trainer.monitor import Monitor, read_metrics
from trainer.state import TrainState
from trainer.step import Job, one_step
from trainer.topology import Topology

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}

BareStep = Callable[..., Tensor]
"""Inputs of the model by name -> the loss."""


class LastBatch:
    """The stream, and what was last taken from it."""

    def __init__(self, stream: Iterator[Batch]) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.batch = next(self.stream)
        return self.batch


def measure_loop(config: PretrainConfig, num_turns: int) -> list[tuple[float, float]]:
    """Seconds of our step and of the bare one, turn by turn on the same batch, after a first turn that is not counted.

    One process: a second model of the same weights, torch's AdamW and clipping; its losses are ours (AssertionError).
    Several: the same engine, driven bare.
    """
    set_process_options(config.parallel, config.seed)
    topology = init_distributed(config.parallel)
    indexes, queries = open_indexes(config.data, build_missing=False), config.model.causal_transformer.num_queries
    loader = Loader(
        config.data,
        indexes,
        Tokenizer(config.data.tokenizer),
        num_queries=queries,
        image_size=config.model.vision.image_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
    )
    batches = iter(loader)
    engine, stream = build_engine(config, topology), LastBatch(batches)
    bare = plain_torch(config, engine.device) if topology.world_size == 1 else driven_bare(engine)
    seconds = []
    with tempfile.TemporaryDirectory(prefix="bench-step-") as name:
        monitor = Monitor(Path(name), config.monitor, asdict(config), 1) if topology.rank == 0 else None
        title = f"loop, {topology.world_size} processes, ZeRO-{config.parallel.zero_stage}"
        silent = True if topology.rank else None
        sizes = {name: index.num_samples for name, index in indexes.items()}
        job = Job(config, engine, stream, TrainState(), topology, monitor, sizes)
        for _ in tqdm(range(num_turns + 1), desc=title, unit="turn", disable=silent):
            start = now()
            one_step(job)
            ours = now() - start
            inputs = prepare(stream.batch, config, engine, topology)
            start = now()
            loss = bare(**inputs)
            seconds.append((ours, now() - start))
            if topology.world_size == 1:
                record = read_metrics(Path(name))[-1]
                assert_same_loss(record["loss/text"] + record["loss/image"], float(loss), config.parallel.precision)
        if monitor is not None:
            monitor.close()
    batches.close()  # type: ignore[attr-defined] # a generator
    return seconds[1:]


def prepare(batch: Batch, config: PretrainConfig, engine: DeepSpeedEngine, topology: Topology) -> dict[str, Any]:
    """The model's inputs on the device, the losses' factors among them."""
    inputs = model_inputs(batch, engine.device)
    counts = count_step([batch], [inputs], config, topology)
    return {
        **inputs,
        "text_scale": topology.dp_size / counts.text_targets,
        "image_scale": topology.dp_size / counts.image_targets,
    }


def plain_torch(config: PretrainConfig, device: torch.device) -> BareStep:
    """In bf16 without master weights, which the engine has."""
    set_process_options(config.parallel, config.seed)  # the engine's weights once more
    model, optim = Emu(config.model, config.objective, len(config.data.sources)).to(device), config.optim
    if config.parallel.precision == "bf16":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim), betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )

    def step(**inputs: Any) -> Tensor:
        loss = model(**inputs)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def driven_bare(engine: DeepSpeedEngine) -> BareStep:
    def step(**inputs: Any) -> Tensor:
        loss = engine(**inputs)["loss"]
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def assert_same_loss(ours: float, bare: float, precision: str) -> None:
    assert abs(ours - bare) <= TOLERANCE[precision] * abs(bare), f"not the same training: losses {ours} and {bare}"
