"""How many parameters a model has and what they take of each GPU's memory, for every ZeRO stage.

    python -m launch.plan model=emu_14b --gpus 32 --gpu-memory-gb 80

Weights, gradients and Adam's state in closed form; activations need what is left. Takes the overrides of training.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from conf import UserError, run_cli
from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig, VisionConfig
from trainer.config import compose_config

GB = 1e9


@dataclass(frozen=True)
class BytesPerParameter:
    """Mixed precision keeps an fp32 copy of the weights beside Adam's two moments."""

    weights: int
    gradients: int
    optimizer: int


PRECISIONS = {"bf16": BytesPerParameter(2, 2, 12), "fp32": BytesPerParameter(4, 4, 8)}


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU at a ZeRO stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def count_vision_encoder(config: VisionConfig) -> int:
    """Patch embedding, class token, positions, blocks (query and value biases, no key bias) and `ln_visual`."""
    width, mlp = config.width, config.mlp_width
    num_patches = (config.image_size // config.patch_size) ** 2
    embeddings = 3 * config.patch_size**2 * width + width + width + (1 + num_patches) * width
    attention = 3 * width * width + 2 * width + width * width + width
    block = attention + 2 * width * mlp + mlp + width + 4 * width
    return embeddings + config.num_layers * block + 2 * width


def count_causal_transformer(config: CausalTransformerConfig, vision_width: int, output_width: int) -> int:
    """T5 decoder blocks (no biases, three norms), one table of relative positions, queries and the projection."""
    width, inner = config.width, config.num_heads * config.head_width
    self_attention = 4 * width * inner
    cross_attention = 2 * width * inner + 2 * vision_width * inner
    block = self_attention + cross_attention + 2 * width * config.mlp_width + 3 * width
    tables = config.num_queries * width + config.position_buckets * config.num_heads
    return config.num_layers * block + tables + width + width * output_width + output_width


def count_language_model(config: LanguageModelConfig) -> int:
    """LLaMA with untied input and output embeddings."""
    width = config.width
    query_width, kv_width = config.num_heads * config.width_of_head, config.num_kv_heads * config.width_of_head
    layer = 2 * width * query_width + 2 * width * kv_width + 3 * width * config.mlp_width + 2 * width
    vocabulary = config.vocabulary
    return config.num_layers * layer + width + 2 * vocabulary * width


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part of the network."""
    width = model.language_model.width
    return {
        "vision encoder": count_vision_encoder(model.vision),
        "causal transformer": count_causal_transformer(model.causal_transformer, model.vision.width, width),
        "language model": count_language_model(model.language_model),
        "regression head": width * width,
    }


def stage_memory(num_parameters: int, num_gpus: int, stage: int, precision: str) -> StageMemory:
    """ZeRO divides Adam's state from stage 1 on, gradients from 2, weights from 3 (Rajbhandari et al. 2020)."""
    size = PRECISIONS[precision]
    return StageMemory(
        stage=stage,
        weights=size.weights * num_parameters / (num_gpus if stage >= 3 else 1),
        gradients=size.gradients * num_parameters / (num_gpus if stage >= 2 else 1),
        optimizer=size.optimizer * num_parameters / (num_gpus if stage >= 1 else 1),
    )


def parameter_table(name: str, counts: dict[str, int]) -> Table:
    total = sum(counts.values())
    rounded = f"{total / 1e9:.2f} B" if total >= 1e9 else f"{total / 1e6:.2f} M"
    table = Table("part", title=f"{name}: {rounded} parameters")
    table.add_column("parameters", justify="right")
    for part, count in counts.items():
        table.add_row(part, f"{count:,}")
    return table


def memory_table(stages: list[StageMemory], gpu_memory_gb: float, title: str) -> Table:
    table = Table(title=title)
    for column in ("ZeRO", "weights", "gradients", "Adam", "sum, GB", "left, GB"):
        table.add_column(column, justify="right")
    for memory in stages:
        left = gpu_memory_gb - memory.total / GB
        cells = [memory.weights, memory.gradients, memory.optimizer, memory.total]
        verdict = f"{left:.1f}" if left > 0 else "[red]too much[/red]"
        table.add_row(str(memory.stage), *(f"{cell / GB:.1f}" for cell in cells), verdict)
    return table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpu-memory-gb", type=float, default=80, help="memory of each (default: %(default)s)")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="bf16", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="overrides as for training, e.g. model=emu_14b")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    args = parse_args()
    if args.gpus < 1:
        raise UserError(f"--gpus is {args.gpus}: give at least 1")
    model = compose_config(["run_dir=unused", *args.overrides]).model
    counts = count_parameters(model)
    stages = [stage_memory(sum(counts.values()), args.gpus, stage, args.precision) for stage in range(4)]
    console = Console()
    console.print(parameter_table(model.name, counts))
    console.print(memory_table(stages, args.gpu_memory_gb, f"GB on each of {args.gpus} GPUs, {args.precision}"))
    fitting = [memory.stage for memory in stages if memory.total < args.gpu_memory_gb * GB]
    if not fitting:
        console.print("Nothing fits: use more GPUs or a smaller model")
    else:
        console.print(f"Lowest stage that fits before activations: parallel.zero_stage={fitting[0]}")


if __name__ == "__main__":
    run_cli(main)
