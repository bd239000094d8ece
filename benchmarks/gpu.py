"""One GPU: ``make bench-gpu``. A training step of a model of real size on rows of the mixture, in bf16.

Prints the loss of variable-length flash attention in bf16 beside that of the fp32 reference, useful tokens a second
with packed rows and with one document a row, utilisation of the device's peak (PaLM, appendix B), and peak memory.
"""

from __future__ import annotations

import trainer  # noqa: F401 # quiets the libraries

# isort: split

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from tqdm import tqdm

from benchmarks.step_corpus import make_corpora
from conf import UserError, run_cli
from data_pipelines.document import Batch
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.tokenizer import Tokenizer
from models.attention_backend import attention_backend
from models.emu import Emu
from trainer.config import PretrainConfig, compose_config, fill_vocabulary
from trainer.engine import build_engine, init_distributed, set_process_options
from trainer.loop import StepResult, model_inputs, training_step
from trainer.state import TrainState
from trainer.topology import Topology
from trainer.utilisation import document_lengths, peak_flops, step_flops

OUT = Path("outputs/benchmarks/step")
WARM_UP = 3


def job(out: Path, overrides: Sequence[str]) -> PretrainConfig:
    os.environ["EMU_DATA"] = str(out / "corpora")
    config = compose_config(
        [
            "data=corpora",
            "model=emu_3b",
            f"data.index_dir={out / 'index'}",
            "data.lanes=8",
            "data.global_batch_rows=8",
            "data.micro_batch_rows=1",
            "parallel.activation_checkpointing=full",
            "parallel=zero1",
            "parallel.precision=bf16",
            "optim.schedule=constant",
            *overrides,
        ]
    )
    fill_vocabulary(config)
    return config


def step_batches(config: PretrainConfig) -> Iterator[list[Batch]]:
    """The micro-batches of one step after another."""
    loader = Loader(
        config.data,
        open_indexes(config.data, build_missing=True),
        Tokenizer(config.data.tokenizer),
        num_queries=config.model.causal_transformer.num_queries,
        image_size=config.model.vision.image_size,
        dp_rank=0,
        dp_size=1,
    )
    batches = iter(loader)
    while True:
        yield [next(batches) for _ in range(config.data.global_batch_rows // config.data.micro_batch_rows)]


def one_document_a_row(batch: Batch) -> Batch:
    """The same documents, each in a row of its own that is padded to the longest."""
    lengths = document_lengths(batch)
    longest = max(lengths)
    shape = (len(lengths), longest)
    ids, document_ids = torch.full(shape, int(batch.input_ids.max())), torch.zeros(shape, dtype=torch.int32)
    positions = torch.zeros(shape, dtype=torch.int64)
    places, number = {}, 0
    for row, documents in enumerate(batch.document_ids):
        for document in range(1, int(documents.max()) + 1):
            first, length = int((documents == document).nonzero()[0]), lengths[number]
            ids[number, :length] = batch.input_ids[row, first : first + length]
            document_ids[number, :length], positions[number, :length] = 1, torch.arange(length)
            places.update({(row, first + column): (number, column) for column in range(length)})
            number += 1
    starts = [places[row, column] for row, column in batch.image_starts.tolist()]
    real = batch.document_sources >= 0
    return replace(
        batch,
        input_ids=ids,
        document_ids=document_ids,
        position_ids=positions,
        image_starts=torch.tensor(starts, dtype=torch.int64).reshape(-1, 2),
        document_sources=batch.document_sources[real][:, None],
        document_ok=batch.document_ok[real][:, None],
        keys=[[key] for row in batch.keys for key in row],
        failures={},
    )


def run_step(
    engine: DeepSpeedEngine, batches: list[Batch], state: TrainState, config: PretrainConfig, topology: Topology
) -> tuple[StepResult, float]:
    """The step's result and its seconds."""
    begin = time.perf_counter()
    result = training_step(engine, batches, state, config, topology)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def measure_speed(config: PretrainConfig, topology: Topology, num_steps: int) -> None:
    engine, state = build_engine(config, topology), TrainState()
    stream = step_batches(config)
    useful, seconds, operations = [0, 0], [0.0, 0.0], [0, 0]
    peak_bytes = [0, 0]
    for number in tqdm(range(WARM_UP + num_steps), desc="steps", unit="step"):
        packed = next(stream)
        for side, batches in enumerate((packed, [one_document_a_row(batch) for batch in packed])):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            result, took = run_step(engine, batches, state, config, topology)
            if number < WARM_UP:
                continue
            counts = result.counts
            num_queries = config.model.causal_transformer.num_queries
            useful[side] += counts.text_targets + counts.image_targets * num_queries // (num_queries + 1)
            seconds[side] += took
            operations[side] += step_flops(config.model, batches, counts.text_targets, counts.image_targets)
            if torch.cuda.is_available():
                peak_bytes[side] = max(peak_bytes[side], torch.cuda.max_memory_allocated())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = peak_flops(name)
    print(f"{config.model.name} on {name}, useful tokens a second (text targets and image slots):")
    shares = []
    for side, label in enumerate(("packed", "one document a row")):
        rate = operations[side] / seconds[side]
        shares.append(f"{rate / peak:.3f}" if peak else "-")
        print(f"  {label}: {useful[side] / seconds[side]:.0f} tokens/s, {rate / 1e12:.2f} TFLOP/s, utilisation "
              f"{shares[-1]}, peak memory {peak_bytes[side] / 1e9:.1f} GB")  # fmt: skip
    vs_padded = useful[0] / seconds[0] / (useful[1] / seconds[1])
    print(f"ratios: vs_padded={vs_padded:.2f} utilisation={shares[0]}")


def measure_loss(config: PretrainConfig) -> None:
    """The same weights and rows in fp32 with SDPA, and in the job's precision with the device's own attention."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = next(step_batches(config))[0]
    losses = []
    for dtype, attention in ((torch.float32, "sdpa"), (torch.bfloat16, "auto")):
        set_process_options(config.parallel, config.seed)
        language = replace(config.model.language_model, attention=attention)
        model = Emu(replace(config.model, language_model=language), config.objective, len(config.data.sources))
        model.to(device, dtype)
        with torch.no_grad():
            outputs = model(**model_inputs(batch, device), text_scale=1.0, image_scale=1.0)
        losses.append(float(outputs["text_loss"].sum() / outputs["text_targets"].sum()))
        del model, outputs
    language = config.model.language_model
    kernel = attention_backend("auto", device, torch.bfloat16, language.width_of_head)
    print(
        f"text loss: fp32 with sdpa {losses[0]:.5f}, bf16 with {kernel} {losses[1]:.5f}, "
        f"difference {abs(losses[1] - losses[0]):.5f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where corpora and indexes are made (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="go on without a GPU, to try the benchmark itself")
    parser.add_argument("overrides", nargs="*", help="overrides as for training, e.g. model=emu_7b parallel=zero3")
    arguments = parser.parse_intermixed_args()
    if not torch.cuda.is_available() and not arguments.cpu:
        raise UserError("there is no CUDA device: run this on a GPU, or give --cpu with a small model to try it")
    make_corpora(arguments.out / "corpora")
    config = job(arguments.out, arguments.overrides)
    topology = init_distributed(config.parallel)
    measure_loss(config)
    measure_speed(config, topology, arguments.steps)


if __name__ == "__main__":
    run_cli(main)
