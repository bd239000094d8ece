"""Peak bytes of a training step against the closed form of `launch.plan`: ``make bench-memory``.

Three models on one process, each with something else that fills the memory. Measured in the second step, when Adam has
its state, from every allocation that torch's profiler reports. Exit code 1 if a peak is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from dataclasses import asdict, dataclass

import torch

from benchmarks.memory_trace import mark, trace
from conf import run_cli
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Batch, SampleKey
from launch.activations import MicroBatch
from launch.memory import Layout, Memory, forward_end, peak, resting
from launch.parameters import count_parameters
from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig, VisionConfig
from trainer.config import ParallelConfig, PretrainConfig

TOLERANCE = 0.1
CHECKPOINTING = ("none", "selective", "full")
BOS, FIRST_PIECE = 1, 3
MB = 1e6
SMALL_VISION = VisionConfig(image_size=56, width=192, num_layers=2, num_heads=3, mlp_width=768)
SMALL_CAUSAL = CausalTransformerConfig(num_queries=8, width=192, num_layers=2, num_heads=3, mlp_width=768)


@dataclass(frozen=True)
class Size:
    """A model and a micro-batch of full rows, one document each, that begin with their images."""

    name: str
    model: ModelConfig
    rows: int
    seq_len: int
    images_per_row: int

    @property
    def micro_batch(self) -> MicroBatch:
        images = self.rows * self.images_per_row
        places = images * (self.model.causal_transformer.num_queries + 2)
        return MicroBatch(self.rows, self.seq_len, images, self.rows * (self.seq_len - 1) - places)


def language(vocabulary: int, width: int, num_layers: int) -> LanguageModelConfig:
    num_heads = width // 64
    return LanguageModelConfig(
        text_vocab_size=vocabulary,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        mlp_width=width * 43 // 16,
    )


SIZES = (
    Size("small", ModelConfig("weights", SMALL_VISION, SMALL_CAUSAL, language(16000, 768, 4)), 1, 128, 2),
    Size("long", ModelConfig("long rows", SMALL_VISION, SMALL_CAUSAL, language(8000, 256, 8)), 1, 2048, 4),
    Size(
        "images",
        ModelConfig(
            "images",
            VisionConfig(image_size=224, width=192, num_layers=6, num_heads=3, mlp_width=768),
            CausalTransformerConfig(num_queries=32, width=192, num_layers=3, num_heads=3, mlp_width=768),
            language(2000, 256, 2),
        ),
        1,
        512,
        12,
    ),
)


@dataclass(frozen=True)
class Measured:
    """Bytes between steps, kept at the end of forward beside those, and at the fullest moment."""

    resting: int
    kept: int
    peak: int


def make_batch(size: Size) -> Batch:
    torch.manual_seed(0)
    vocabulary, num_queries = size.model.language_model.text_vocab_size, size.model.causal_transformer.num_queries
    _, img, img_end, image = range(vocabulary, vocabulary + 4)
    picture = torch.tensor([img, *[image] * num_queries, img_end])
    input_ids = torch.randint(FIRST_PIECE, vocabulary, (size.rows, size.seq_len))
    input_ids[:, 0] = BOS
    input_ids[:, 1 : 1 + len(picture) * size.images_per_row] = picture.repeat(size.images_per_row)
    starts = (input_ids == img).nonzero()
    shape = (len(starts), 3, size.model.vision.image_size, size.model.vision.image_size)
    return Batch(
        input_ids=input_ids,
        document_ids=torch.ones(size.rows, size.seq_len, dtype=torch.int32),
        position_ids=torch.arange(size.seq_len).repeat(size.rows, 1),
        images=torch.randint(256, shape, dtype=torch.uint8),
        image_starts=starts,
        image_counts=[len(starts)],
        document_sources=torch.zeros(size.rows, 1, dtype=torch.int64),
        document_ok=torch.ones(size.rows, 1, dtype=torch.bool),
        keys=[[SampleKey("made up", 0, row)] for row in range(size.rows)],
        cursors={},
        failures={},
        skips={},
    )


def make_config(size: Size, layout: Layout) -> PretrainConfig:
    source = SourceConfig(kind="pairs", shards="")
    names = ParallelConfig.__dataclass_fields__.keys() & asdict(layout).keys()
    return PretrainConfig(
        run_dir="",
        model=size.model,
        data=DataConfig(
            sources={"made up": source},
            tokenizer="",
            seq_len=size.seq_len,
            micro_batch_rows=size.rows,
            global_batch_rows=size.rows * (2 if layout.accumulates else 1),
        ),
        parallel=ParallelConfig(**{name: getattr(layout, name) for name in names}),
    )


def measure(size: Size, layout: Layout) -> Measured:
    """Two steps in this process, which is to be a new one: what earlier work has left would count."""
    logging.disable(logging.WARNING)
    from trainer.engine import build_engine, init_distributed, set_process_options
    from trainer.loop import training_step
    from trainer.state import TrainState

    config = make_config(size, layout)
    set_process_options(config.parallel, config.seed)
    topology = init_distributed(config.parallel)

    batches = [make_batch(size) for _ in range(2 if layout.accumulates else 1)]

    def two_steps() -> None:
        engine, state = build_engine(config, topology), TrainState()

        def forward_done(*_: object) -> None:
            mark("forward done")

        engine.module.register_forward_hook(forward_done)
        for _ in range(2):
            mark("step")
            training_step(engine, batches, state, config, topology)
        engine.destroy()

    stretches = trace(two_steps)
    second = max(number for number, stretch in enumerate(stretches) if stretch.name == "step")
    begin, forward = stretches[second], stretches[second + 1]
    images = batches[0].images.nbytes  # made before; the plan counts them among the activations
    top = max(stretch.peak for stretch in stretches[second:])
    return Measured(begin.begin, forward.begin - begin.begin + images, top + images)


def measure_in_new_process(size: Size, layout: Layout) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (size, layout))


def planned(size: Size, layout: Layout) -> tuple[Memory, Memory, Memory]:
    """Between steps, at the end of forward, and at the fullest moment."""
    rest = resting(sum(count_parameters(size.model).values()), layout)
    return rest, forward_end(size.model, size.micro_batch, layout), peak(size.model, size.micro_batch, layout)


def report(size: Size, layout: Layout, measured: Measured) -> float:
    """Print plan and measurement; plan over measurement at the fullest moment."""
    rest, forward, top = planned(size, layout)
    ratio = top.total / measured.peak
    row = "  {:<28} {:>9} {:>9} {:>6}".format
    print(f"\n{size.name}: {size.rows} x {size.seq_len} positions, {size.micro_batch.images} images")
    print(row("MB", "plan", "measured", "ratio"))
    for name, plan, seen in (
        ("weights and Adam, at rest", rest.total, measured.resting),
        ("activations after forward", forward.total - rest.total, measured.kept),
        ("peak", top.total, measured.peak),
    ):
        print(row(name, f"{plan / MB:.1f}", f"{seen / MB:.1f}", f"{plan / seen:.3f}"))
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
    shares = ", ".join(f"{part} {getattr(top, part) / MB:.1f}" for part in parts)
    print(f"  planned peak ({top.moment}): {shares}")
    return ratio


def main() -> int:
    default = ParallelConfig()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=0, help="default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=default.precision, help="default: %(default)s")
    parser.add_argument(
        "--activation-checkpointing",
        choices=CHECKPOINTING,
        default=default.activation_checkpointing,
        help="default: %(default)s",
    )
    parser.add_argument("--accumulate", action="store_true", help="two micro-batches a step")
    args = parser.parse_args()
    layout = Layout(
        zero_stage=args.zero_stage,
        precision=args.precision,
        activation_checkpointing=args.activation_checkpointing,
        accumulates=args.accumulate,
        device="cpu",
    )
    ratios = {size.name: report(size, layout, measure_in_new_process(size, layout)) for size in SIZES}
    print("\nratios: " + " ".join(f"{name}={ratio:.3f}" for name, ratio in ratios.items()))
    return int(any(abs(ratio - 1) > TOLERANCE for ratio in ratios.values()))


if __name__ == "__main__":
    run_cli(main)
