"""Validate and train in a layout, and what a plain loop over single documents makes of the same held-out samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.document import Document, Text
from data_pipelines.loader import Loader, holdout_documents, open_indexes
from data_pipelines.packing import tokenize_documents
from data_pipelines.pictures import decode_pictures
from data_pipelines.tokenizer import Tokenizer
from models.emu import Emu
from tests.distributed.parity import pretend_that_the_cpu_is_the_cuda_device
from trainer.config import PretrainConfig
from trainer.topology import Topology

NUM_STEPS = 4


@dataclass(frozen=True)
class Layout:
    """validated: steps with a validation before them. ZeRO-3 learns its order of modules in the first step."""

    dp: int
    tp: int
    stage: int
    persistence_threshold: int = 0
    sequence: bool = False
    recompute: str = "none"
    objective: str = "full"
    validated: tuple[int, ...] = (0, 1, 3)


@dataclass
class Seen:
    """values, captions: at the start. few: the same with fewer rows than ranks. trainings: loss sums, gradient norms,
    weights and the like of training without and with validations. whole_weights, kept_order: how many weights are whole
    on this rank, and whether ZeRO-3 keeps its record of training, by step, first without validations.
    """

    values: dict[str, float] = field(default_factory=dict)
    captions: list[tuple[str, str, str]] = field(default_factory=list)
    few: dict[str, float] = field(default_factory=dict)
    few_captions: list[tuple[str, str, str]] = field(default_factory=list)
    trainings: list[dict[str, Tensor]] = field(default_factory=list)
    whole_weights: list[int] = field(default_factory=list)
    kept_order: list[bool] = field(default_factory=list)


def in_layout(config: PretrainConfig, layout: Layout) -> PretrainConfig:
    changes = {
        "zero_stage": layout.stage,
        "tensor": layout.tp,
        "sequence": layout.sequence,
        "persistence_threshold": layout.persistence_threshold,
        "activation_checkpointing": layout.recompute,
    }
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, **changes),
        objective=dataclasses.replace(config.objective, regression_gradient=layout.objective),
    )


def with_few(config: PretrainConfig) -> PretrainConfig:
    """One row, of one source, two pairs and one sample."""
    sources = {
        name: dataclasses.replace(source, holdout=source.holdout if name == "laion" else 0.0)
        for name, source in config.data.sources.items()
    }
    few = dataclasses.replace(config.validation, rows=1, retrieval=2, samples=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources), validation=few)


def run_layout(config: PretrainConfig, layout: Layout, topology: Topology, trains: bool) -> Seen:
    from trainer.engine import build_engine, set_process_options

    config, seen = in_layout(config, layout), Seen()
    if layout.sequence:
        pretend_that_the_cpu_is_the_cuda_device()
    set_process_options(config.parallel, config.seed)
    engine = build_engine(config, topology)
    seen.values, seen.captions = look(engine, config, topology)
    seen.few, seen.few_captions = look(engine, with_few(config), topology)
    engine.destroy()
    for validates in (False, True) if trains else ():
        train(config, layout.validated if validates else (), topology, seen)
    return seen


def look(
    engine: Any, config: PretrainConfig, topology: Topology
) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    from trainer.held_out import HeldOut
    from trainer.validation import validate

    indexes = open_indexes(config.data, build_missing=False)
    held_out = HeldOut(config, indexes, Tokenizer(config.data.tokenizer), topology)
    values, samples = validate(engine, held_out)
    assert values == validate(engine, held_out)[0], "the second time differs"
    return values, [(sample.source, sample.truth, sample.generated) for sample in samples]


def train(config: PretrainConfig, validated: tuple[int, ...], topology: Topology, seen: Seen) -> None:
    from tests.distributed.parity import gathered
    from trainer.engine import build_engine, set_process_options
    from trainer.evaluating import COUNTER
    from trainer.held_out import HeldOut
    from trainer.loop import training_step
    from trainer.state import TrainState
    from trainer.validation import validate

    set_process_options(config.parallel, config.seed)
    engine, state = build_engine(config, topology), TrainState()
    indexes, tokenizer = open_indexes(config.data, build_missing=False), Tokenizer(config.data.tokenizer)
    held_out = HeldOut(config, indexes, tokenizer, topology)
    loader = iter(
        Loader(
            config.data,
            indexes,
            tokenizer,
            num_queries=held_out.num_queries,
            image_size=config.model.vision.image_size,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            tp_rank=topology.tp_rank,
            tp_size=topology.tp_size,
        )
    )
    result: dict[str, Tensor] = {}
    order = module_order(engine)
    for step in range(NUM_STEPS):
        if step in validated:
            validate(engine, held_out)
        seen.whole_weights.append(sum(p.numel() > 0 for p in engine.module.parameters()))
        batches = [next(loader) for _ in range(engine.gradient_accumulation_steps())]
        done = training_step(engine, batches, state, config, topology)
        sums = [done.sums.values["text_loss"], done.sums.values["image_loss"], torch.tensor([done.grad_norm])]
        seen.kept_order.append(module_order(engine) is order)
        order = module_order(engine)
        result[f"step {step}"] = torch.cat([value.double() for value in sums])
    result |= gathered(engine, topology)
    result["random"] = torch.get_rng_state()
    awaited = sum(part.__dict__.get(COUNTER, 0) for part in engine.module.modules())
    result["counters"] = torch.tensor([engine.global_steps, engine.micro_steps, engine.global_samples, awaited])
    seen.trainings.append(result)
    engine.destroy()


def module_order(engine: Any) -> Any:
    """ZeRO-3's record of the order in which training calls modules; another object once it was thrown away."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    return offload and vars(offload.param_coordinator)["_PartitionedParameterCoordinator__submodule_order"]


def run_layouts(config: PretrainConfig, layouts: dict[str, Layout], train_in: list[str]) -> dict[str, Any]:
    """All of these, which have one world size; "plain" too, if it is one process."""
    import logging

    logging.disable(logging.WARNING)
    from megatron.core import parallel_state

    from trainer.engine import init_distributed

    seen: dict[str, Any] = {}
    for tp in sorted({layout.tp for layout in layouts.values()}):
        parallel_state.destroy_model_parallel()
        topology = init_distributed(dataclasses.replace(config.parallel, tensor=tp))
        here = {name: layout for name, layout in layouts.items() if layout.tp == tp}
        seen |= {name: run_layout(config, layout, topology, name in train_in) for name, layout in here.items()}
    if topology.world_size == 1:
        seen["plain"] = Seen(*look_plainly(config))
    return seen


def look_plainly(config: PretrainConfig) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    """Every held-out document alone, through the model itself; the captions from whole rows of logits."""
    torch.manual_seed(config.seed)
    model = Emu(config.model, config.objective, len(config.data.sources)).eval()
    tokenizer, data = Tokenizer(config.data.tokenizer), config.data
    num_queries = config.model.causal_transformer.num_queries
    sums: dict[str, list[float]] = {}
    samples: list[tuple[str, str, str]] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    num_pairs = 0
    for source, (name, index) in enumerate(open_indexes(data, build_missing=False).items()):
        for key, document in holdout_documents(data, index, name):
            tokenized = tokenize_documents([(key, 0, document)], tokenizer, num_queries, data.seq_len, 99)[0]
            pictures = [e for e in document.elements if not isinstance(e, Text)]
            decoded = decode_pictures(pictures, config.model.vision.image_size, 10**6)
            is_pair, is_broken = len(pictures) == 1, any(isinstance(d, Exception) for d in decoded)
            num_pairs += is_pair
            if is_broken:
                continue
            images = [torch.from_numpy(d) for d in decoded]
            add_losses(sums, name, run_alone(model, tokenized.input_ids.tolist(), images, source), source)
            if is_pair and num_pairs <= config.validation.retrieval:
                pairs.append(regress(model, tokenizer, document, images[0]))
            if is_pair and num_pairs <= config.validation.samples:
                caption = continue_greedily(model, tokenizer, images[0], config.validation.sample_tokens)
                text = next(e.text for e in document.elements if isinstance(e, Text))
                samples.append((name, tokenizer.decode(tokenizer.encode([text])[0]), tokenizer.decode(caption)))
    values = {f"loss/{name}": loss / count for name, (loss, count) in sums.items() if count}
    return values | nearest_share(pairs), samples


def run_alone(model: Emu, ids: list[int], images: list[Tensor], source: int) -> dict[str, Tensor]:
    img = model.config.language_model.text_vocab_size + 1
    size = model.config.vision.image_size
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]),
            document_ids=torch.ones(1, len(ids), dtype=torch.int32),
            position_ids=torch.arange(len(ids))[None],
            images=torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8),
            image_starts=torch.tensor([[0, i] for i, t in enumerate(ids) if t == img], dtype=torch.int64).reshape(
                -1, 2
            ),
            image_counts=[len(images)],
            document_sources=torch.tensor([[source]]),
            document_ok=torch.tensor([[True]]),
            text_scale=1.0,
            image_scale=1.0,
        )


def add_losses(sums: dict[str, list[float]], name: str, outputs: dict[str, Tensor], source: int) -> None:
    for kind in ("text", "image"):
        loss, count = (float(outputs[f"{kind}_{what}"][source]) for what in ("loss", "targets"))
        for key in (kind, f"{kind}/{name}"):
            total = sums.setdefault(key, [0.0, 0.0])
            total[0] += loss
            total[1] += count


def hidden_of(model: Emu, ids: list[int], image: Tensor) -> tuple[Tensor, Tensor]:
    """[S, W] after the norm, and the picture's embeddings [N, W]."""
    img = model.config.language_model.text_vocab_size + 1
    with torch.no_grad():
        visual = model.encode(image[None])
        inputs = torch.tensor([ids])
        embeddings = model.language_model.embed_tokens(inputs).clone()
        start = ids.index(img) + 1
        embeddings[0, start : start + visual.shape[1]] = visual[0]
        ones = torch.ones(1, len(ids), dtype=torch.int32)
        return model.language_model(embeddings, ones, torch.arange(len(ids))[None])[0], visual[0]


def slots(model: Emu) -> list[int]:
    text = model.config.language_model.text_vocab_size
    return [text + 1, *[text + 3] * model.config.causal_transformer.num_queries, text + 2]


def regress(model: Emu, tokenizer: Tokenizer, document: Document, image: Tensor) -> tuple[Tensor, Tensor]:
    text = tokenizer.encode([next(e.text for e in document.elements if isinstance(e, Text))])[0]
    hidden, visual = hidden_of(model, [tokenizer.bos, *text, *slots(model)], image)
    return model.regression_head(hidden[1 + len(text)]).detach(), visual[0]


def nearest_share(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    regressed, true = (torch.stack(values) - torch.stack(values).mean(dim=0) for values in zip(*pairs, strict=True))
    similarity = F.cosine_similarity(regressed[:, None], true[None], dim=-1)
    right = sum(int(row.argmax()) == i for i, row in enumerate(similarity))
    return {"retrieval_at_1": right / len(pairs), "retrieval_of": len(pairs)}


def continue_greedily(model: Emu, tokenizer: Tokenizer, image: Tensor, num_tokens: int) -> list[int]:
    generated: list[int] = []
    while len(generated) < num_tokens:
        hidden, _ = hidden_of(model, [tokenizer.bos, *slots(model), *generated], image)
        logits = hidden[-1] @ model.text_head.weight.detach().t()
        logits[tokenizer.text_vocab_size :] = float("-inf")
        if int(logits.argmax()) == tokenizer.eos:
            break
        generated.append(int(logits.argmax()))
    return generated
