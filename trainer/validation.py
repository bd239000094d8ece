"""Validation during training: losses, text-to-image retrieval and sample captions on held-out documents.

Every rank runs the same number of forward passes, else ZeRO-3 would hang: one without a row runs a blank one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from data_pipelines.heldout import HeldOutRow, make_batch
from trainer.diagnostics import StepSums, loss_metrics
from trainer.evaluating import evaluating
from trainer.held_out import HeldOut, longest
from trainer.loop import agree_on_failures, model_inputs
from trainer.monitor import Monitor
from trainer.samples import Sample, show, write_samples

SHORT_ROWS = 32
"""Rows of one document each in a forward pass, at most."""


def run_validation(engine: DeepSpeedEngine, held_out: HeldOut, monitor: Monitor | None, step: int) -> None:
    """Validate and record it, or do nothing if no source has held-out documents. Collective. monitor: on rank 0."""
    values, samples = validate(engine, held_out)
    if monitor is not None and values:
        folder = write_samples(Path(held_out.config.run_dir), step, samples)
        monitor.validation(step, values, folder)


def validate(engine: DeepSpeedEngine, held_out: HeldOut) -> tuple[dict[str, float], list[Sample]]:
    """Figures by name, the same on every rank and for every number of ranks, and on rank 0 the samples. Collective.

    loss/text, loss/image, the same by source (loss/text/laion): means over the targets of all rows. retrieval_at_1:
    share of texts whose own picture's first embedding is the nearest to the one regressed from the text, among
    retrieval_of pictures (chance is 1 / retrieval_of). What there is nothing for is left out.
    """
    chosen = held_out.chosen()
    with evaluating(engine) as module:
        values: dict[str, float] = mean_losses(module, engine.device, held_out)
        values |= retrieval(module, engine.device, held_out)
        texts = captions(module, engine.device, held_out)
    return values, show(chosen.shown, texts, held_out) if chosen.shown else []


def mean_losses(module: nn.Module, device: torch.device, held_out: HeldOut) -> dict[str, float]:
    data, topology = held_out.config.data, held_out.topology
    sums = StepSums()
    for rows in held_out.chosen().rows.passes(data.micro_batch_rows, topology.dp_size):
        inputs = inputs_of(rows, data.seq_len, device, held_out)
        sums.add(module(**inputs))
    if not sums.values:
        return {}
    if sums.reduce((), topology).offenders:  # their rows are left out of the sums: no mean without them
        return {"loss/text": math.nan, "loss/image": math.nan}
    metrics = loss_metrics(sums, held_out.source_names)
    empty = [f"loss/{kind}" for kind in ("text", "image") if sums.values[f"{kind}_targets"].sum() == 0]
    return {name: value for name, value in metrics.items() if name.startswith("loss/") and name not in empty}


def retrieval(module: nn.Module, device: torch.device, held_out: HeldOut) -> dict[str, float]:
    """retrieval_at_1 and retrieval_of over the pairs whose picture could be decoded, if there are two."""
    pairs, topology = held_out.chosen().pairs, held_out.topology
    width = held_out.config.model.language_model.width
    table = torch.zeros(pairs.total, 2, width, device=device)  # regressed, true
    is_ok = torch.zeros(pairs.total, device=device)
    for rows in pairs.passes(SHORT_ROWS, topology.dp_size):
        inputs = inputs_of(rows, longest(rows, topology.tp_size), device, held_out)
        outputs = module(**inputs, answers=True)
        if rows:
            numbers = torch.tensor([row.number for row in rows], device=device)
            of_images = numbers[inputs["image_starts"][:, 0]]
            table[of_images] = torch.stack([outputs["regressed"], outputs["first_slots"]], dim=1).float()
            is_ok[numbers] = inputs["document_ok"][:, 0].float()
    for values in (table, is_ok):  # a pair is known to one data-parallel rank, zero on the others
        dist.all_reduce(values, group=topology.dp_group)
    regressed, true = table[is_ok > 0].unbind(dim=1)
    return {"retrieval_at_1": share_nearest(regressed, true), "retrieval_of": len(true)} if len(true) > 1 else {}


def share_nearest(regressed: Tensor, true: Tensor) -> float:
    """Share of the rows of [n, W] `regressed` whose nearest row of [n, W] `true` has the same number.

    By cosine, after the mean over rows is taken from either: all embeddings share a direction that tells nothing.
    """
    directions = [F.normalize(values - values.mean(dim=0), dim=1) for values in (regressed, true)]
    nearest = (directions[0] @ directions[1].t()).argmax(dim=1)
    return float((nearest == torch.arange(len(true), device=true.device)).float().mean())


def captions(module: nn.Module, device: torch.device, held_out: HeldOut) -> dict[int, list[int]]:
    """Ids of the greedily generated caption of each prompt, by its number, on every rank; without broken pictures."""
    prompts, topology = held_out.chosen().prompts, held_out.topology
    table = torch.zeros(prompts.total, held_out.config.validation.sample_tokens, dtype=torch.int64, device=device)
    is_ok = torch.zeros(prompts.total, dtype=torch.int64, device=device)
    for rows in prompts.passes(SHORT_ROWS, topology.dp_size):
        inputs = inputs_of(rows, longest(rows, topology.tp_size), device, held_out)
        could_decode = inputs["document_ok"][:, 0].long()
        inputs["document_ok"] = torch.ones_like(inputs["document_ok"])  # the rows keep in step
        texts = generate(module, inputs, len(rows), table.shape[1], held_out)
        if rows:
            numbers = [row.number for row in rows]
            table[numbers], is_ok[numbers] = texts, could_decode
    for values in (table, is_ok):
        dist.all_reduce(values, group=topology.dp_group)
    eos = held_out.settings.tokenizer.eos
    by_number = {number: ids for number, ids in enumerate(table.tolist()) if is_ok[number]}
    return {number: ids[: ids.index(eos)] if eos in ids else ids for number, ids in by_number.items()}


def generate(module: nn.Module, inputs: dict[str, Any], num_rows: int, num_tokens: int, held_out: HeldOut) -> Tensor:
    """int64 [num_rows, num_tokens]: the likeliest token after token, each from a pass over the whole rows.

    The rows end in num_tokens places for text. Passes stop when every row of every rank has its `</s>`.
    """
    eos, group = held_out.settings.tokenizer.eos, held_out.topology.dp_group
    first = held_out.num_queries + 3
    texts = inputs["input_ids"][:num_rows, first : first + num_tokens]
    for place in range(num_tokens):
        next_tokens = module(**inputs, answers=True)["next_tokens"]
        if num_rows:
            texts[:, place] = next_tokens.view(num_rows, num_tokens)[:, place]
        open_rows = (texts[:, : place + 1] != eos).all(dim=1).sum()
        dist.all_reduce(open_rows, group=group)
        if open_rows == 0:
            break
    return texts


def inputs_of(rows: list[HeldOutRow], length: int, device: torch.device, held_out: HeldOut) -> dict[str, Any]:
    """The rows, or a blank one, as the model takes them. Collective over the tensor-parallel group."""
    batch = make_batch(rows, held_out.settings, held_out.source_names, length)
    agree_on_failures([batch], held_out.topology, device)
    return {**model_inputs(batch, device), "text_scale": 1.0, "image_scale": 1.0}
