"""Does a training job fit into the GPUs' memory: its fullest moment, part by part, at every ZeRO stage.

    python -m launch.plan +experiment=emu_14b --gpus 32 --gpu-memory-gb 80

Takes the overrides of training; rows are taken to be full of text targets and images (`launch/memory.py`).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from conf import UserError, run_cli
from launch.activations import MicroBatch
from launch.memory import CHECKPOINT_BYTES_PER_PARAMETER, Layout, Memory, peak
from launch.parameters import count_parameters
from trainer.config import PretrainConfig, compose_config, fill_vocabulary
from trainer.config_checks import data_parallel_size, validate_model, validate_parallel

GB = 1e9
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def full_micro_batch(config: PretrainConfig) -> MicroBatch:
    """The rows that take most: as many images as are allowed or have room, and a text target at every place left."""
    data, places = config.data, config.model.causal_transformer.num_queries + 2
    images = data.micro_batch_rows * min(data.max_images_per_row, data.seq_len // places)
    text_targets = data.micro_batch_rows * data.seq_len - images * places
    return MicroBatch(data.micro_batch_rows, data.seq_len, images, text_targets)


def layout_of(config: PretrainConfig, num_gpus: int) -> Layout:
    parallel, dp = config.parallel, data_parallel_size(config.parallel.tensor, num_gpus)
    return Layout(
        zero_stage=parallel.zero_stage,
        dp=dp,
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        activation_checkpointing=parallel.activation_checkpointing,
        precision=parallel.precision,
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
        attention=config.model.language_model.attention,
        accumulates=config.data.global_batch_rows > dp * config.data.micro_batch_rows,
    )


def stages(layout: Layout) -> list[Layout]:
    """The layout at every ZeRO stage that can do what it offloads."""
    least = 3 if layout.offload_parameters != "none" else 1 if layout.offload_optimizer != "none" else 0
    return [replace(layout, zero_stage=stage) for stage in range(least, 4)]


def parameter_table(name: str, counts: dict[str, int]) -> Table:
    total = sum(counts.values())
    rounded = f"{total / 1e9:.2f} B" if total >= 1e9 else f"{total / 1e6:.2f} M"
    table = Table("part", title=f"{name}: {rounded} parameters")
    table.add_column("parameters", justify="right")
    for part, count in counts.items():
        table.add_row(part, f"{count:,}")
    return table


def memory_table(peaks: dict[int, Memory], gpu_memory_gb: float, title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("ZeRO", *PARTS[:2], "Adam", *PARTS[3:], "sum", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage, memory in peaks.items():
        cells = (f"{getattr(memory, part) / GB:.1f}" for part in PARTS)
        left = f"{gpu_memory_gb - memory.total / GB:.1f}"
        left = left if memory.total < gpu_memory_gb * GB else f"[red]{left}[/red]"
        table.add_row(str(stage), *cells, f"{memory.total / GB:.1f}", left)
    return table


def verdict(peaks: dict[int, Memory], gpu_memory_gb: float) -> str:
    for stage, memory in peaks.items():
        if memory.total < gpu_memory_gb * GB:
            return f"Lowest stage that fits: parallel.zero_stage={stage} (fullest moment: {memory.moment})"
    return (
        "Nothing fits: use more GPUs, parallel.activation_checkpointing=full, parallel.tensor, a smaller "
        "data.micro_batch_rows or a smaller model"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpu-memory-gb", type=float, default=80, help="memory of each (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="overrides as for training, e.g. +experiment=emu_14b")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    args = parse_args()
    if args.gpus < 1:
        raise UserError(f"--gpus is {args.gpus}: give at least 1")
    config = compose_config(["run_dir=unused", *args.overrides])
    if config.model.language_model.text_vocab_size == 0:
        fill_vocabulary(config)
    validate_parallel(config)
    validate_model(config.model, config.parallel.tensor)
    batch, layout = full_micro_batch(config), layout_of(config, args.gpus)
    peaks = {layout.zero_stage: peak(config.model, batch, layout) for layout in stages(layout)}
    console = Console()
    console.print(parameter_table(config.model.name, count_parameters(config.model)))
    title = f"GB on each of {args.gpus} GPUs at the fullest moment of a step\n"
    title += f"{batch.rows} x {batch.seq_len} positions, {batch.images} images, {layout.precision}, "
    title += f"tensor={layout.tensor}, activation_checkpointing={layout.activation_checkpointing}"
    console.print(memory_table(peaks, args.gpu_memory_gb, title))
    host = CHECKPOINT_BYTES_PER_PARAMETER * sum(count_parameters(config.model).values()) / GB
    console.print(f"On the hosts, over all nodes: {host:.3g} GB for the copy from which checkpoints are written.")
    console.print("Not counted: CUDA context, NCCL, fragmentation. Leave a tenth free for them.")
    console.print(verdict(peaks, args.gpu_memory_gb))


if __name__ == "__main__":
    run_cli(main)
