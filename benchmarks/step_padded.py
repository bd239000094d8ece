"""Packed rows against the same documents as OpenFlamingo's and Emu's trainers batch them: one source, a sample a row.

Both compute with the same parameters (the very tensors). Theirs is transformers' LLaMA with a mask over the padding and
logits at every position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step_ranks import now
from data_pipelines.config import DataConfig
from data_pipelines.document import Batch, PackedRow
from data_pipelines.lane import Lane, LaneSettings, first_cursor
from data_pipelines.loader import open_indexes
from data_pipelines.packing import collate
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from models.config import LanguageModelConfig
from models.emu import Emu
from models.weights.export_ import llama_config
from trainer.config import PretrainConfig
from trainer.engine import init_distributed, parameter_groups, set_process_options
from trainer.loop import model_inputs

SHARE_OF_A_BATCH = 1 / 8
"""Of Emu's batch sizes: 16 pairs, 8 pages, 2 videos or storyboards. Larger ones pad more."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
IGNORED = -100

Inputs = dict[str, Any]


@dataclass
class Losses:
    """total: to be driven backward. text, image: sums over the targets, detached."""

    total: Tensor
    text: Tensor
    image: Tensor


Language = Callable[[Inputs, Tensor, float, float], Losses]
"""(inputs, visual embeddings [M, N, W], factors of the sums of the text and the image losses) -> losses."""


@dataclass
class Work:
    """The documents of one optimizer step in micro-batches. num_slots: of an image."""

    batches: list[Inputs]
    num_text: int
    num_images: int
    num_slots: int

    @property
    def useful_tokens(self) -> int:
        """Text targets and image slots."""
        return self.num_text + self.num_images * self.num_slots

    @property
    def num_positions(self) -> int:
        """That the language model computes, padding included."""
        return sum(inputs["input_ids"].numel() for inputs in self.batches)


@dataclass
class Pass:
    """Forward and backward over a step's documents. vision, language: seconds; text, image: the sums of the losses.

    language: from the embeddings to the losses and back.
    """

    vision: float = 0.0
    language: float = 0.0
    text: float = 0.0
    image: float = 0.0


@dataclass
class Turn:
    """The same documents by both; optimizer: seconds of the update, which is the same for both."""

    ours: Pass
    theirs: Pass
    optimizer: float
    useful_tokens: int
    our_positions: int
    their_positions: int

    @property
    def whole(self) -> tuple[float, float]:
        """Seconds of the whole step, ours and theirs."""
        ours, theirs = (one.vision + one.language + self.optimizer for one in (self.ours, self.theirs))
        return ours, theirs


class PackedLanguageModel:
    """Emu's forward pass as it stands, with visual embeddings that have been made before."""

    def __init__(self, model: Emu) -> None:
        self.model = model

    def __call__(self, inputs: Inputs, visual: Tensor, text_scale: float, image_scale: float) -> Losses:
        with mock.patch.object(self.model, "encode", lambda _: visual):
            outputs = self.model(**inputs, text_scale=text_scale, image_scale=image_scale)
        return Losses(outputs["loss"], outputs["text_loss"].sum(), outputs["image_loss"].sum())


class PaddedLanguageModel:
    """transformers' LLaMA on Emu's own parameters, and the two losses written out at every position."""

    def __init__(self, model: Emu) -> None:
        self.config: LanguageModelConfig = model.config.language_model
        settings = llama_config(self.config, torch.float32) | {"attn_implementation": "sdpa"}
        self.llama = LlamaForCausalLM(LlamaConfig.from_dict(settings))
        shared = {f"model.{name}": parameter for name, parameter in model.language_model.named_parameters()}
        self.llama.load_state_dict({**shared, "lm_head.weight": model.text_head.weight}, assign=True)
        self.llama.model.rotary_emb.to(model.regression_head.weight.device)  # the only tensors of its own
        self.regression_head = model.regression_head

    def __call__(self, inputs: Inputs, visual: Tensor, text_scale: float, image_scale: float) -> Losses:
        input_ids, real = inputs["input_ids"], inputs["document_ids"] > 0
        image_start, image = self.config.text_vocab_size + 1, self.config.text_vocab_size + 3
        embeddings = self.llama.get_input_embeddings()(input_ids)
        embeddings = embeddings.masked_scatter((input_ids == image)[..., None], visual.to(embeddings.dtype))
        output = self.llama(inputs_embeds=embeddings, attention_mask=real.long(), output_hidden_states=True)

        hidden, next_embeddings = output.hidden_states[-1][:, :-1], embeddings.detach()[:, 1:]
        labels = input_ids[:, 1:].masked_fill(input_ids[:, 1:] >= self.config.text_vocab_size, IGNORED)
        logits = output.logits[:, :-1].float().flatten(0, 1)
        text = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        predicts = ((input_ids == image_start) | (input_ids == image))[:, :-1]
        predicted, wanted = self.regression_head(hidden[predicts]).float(), next_embeddings[predicts].float()
        errors = F.mse_loss(predicted, wanted, reduction="sum") / self.config.width
        return Losses(text_scale * text + image_scale * errors, text.detach(), errors.detach())


def compare(config: PretrainConfig, num_turns: int, num_rows: int) -> list[Turn]:
    """Turns of one step each on `num_rows` further rows of lane 0, after a first one on one row that is not counted.

    AssertionError where the two do not find the same losses.
    """
    set_process_options(config.parallel, config.seed)
    init_distributed(config.parallel)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, rows = Tokenizer(config.data.tokenizer), rows_of_lane(config)
    model = Emu(config.model, config.objective, len(config.data.sources)).to(device)
    contenders: tuple[Language, Language] = PackedLanguageModel(model), PaddedLanguageModel(model)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim), betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )

    def turn(several: list[PackedRow]) -> Turn:
        works = [
            prepare(packed(several, config, tokenizer), config, device),
            prepare(padded(several, config, tokenizer), config, device),
        ]
        ours, theirs = (run_pass(model, work, one) for work, one in zip(works, contenders, strict=True))
        assert_same_losses(ours, theirs, TOLERANCE[next(model.parameters()).dtype])
        start = now()
        optimizer.step()
        seconds = now() - start
        optimizer.zero_grad()
        return Turn(ours, theirs, seconds, works[0].useful_tokens, *(work.num_positions for work in works))

    turn([next(rows)])
    if device.type == "cuda":
        model.to(torch.bfloat16)  # in place: theirs too
    progress = tqdm(range(num_turns), desc="packed and padded", unit="turn", disable=None)
    return [turn([next(rows) for _ in range(num_rows)]) for _ in progress]


def rows_of_lane(config: PretrainConfig, tp_rank: int = 0, tp_size: int = 1) -> Iterator[PackedRow]:
    """The rows that a run trains on first, those of one lane, with the pictures of one tensor-parallel rank."""
    data, indexes = config.data, open_indexes(config.data, build_missing=False)
    readers = [SourceReader(name, data, index) for name, index in indexes.items()]
    num_queries, image_size = config.model.causal_transformer.num_queries, config.model.vision.image_size
    tokenizer, buffer_bytes = Tokenizer(data.tokenizer), data.buffer_mb << 20
    settings = LaneSettings(data, readers, tokenizer, num_queries, image_size, buffer_bytes, tp_rank, tp_size)
    lane = Lane(0, settings, first_cursor(0, len(readers)))
    while True:
        yield lane.next_row()


def packed(rows: Sequence[PackedRow], config: PretrainConfig, tokenizer: Tokenizer) -> list[Batch]:
    """Ours: a row a micro-batch."""
    return [collate([row], config.data.seq_len, tokenizer.pad, list(config.data.sources)) for row in rows]


def padded(rows: Sequence[PackedRow], config: PretrainConfig, tokenizer: Tokenizer) -> list[Batch]:
    """Theirs: the same documents in batches of one source, a document a row, as long as the longest of the batch."""
    documents = [document for row in rows for document in one_by_one(row)]
    batches = []
    for name in config.data.sources:
        own = [row for row in documents if row.documents[0].key.source == name]
        size = batch_size(config.data, name)
        for several in (own[first : first + size] for first in range(0, len(own), size)):
            longest = max(len(row.documents[0].input_ids) for row in several)
            batches.append(collate(several, longest, tokenizer.pad, list(config.data.sources)))
    return batches


def batch_size(data: DataConfig, source: str) -> int:
    """The weights of conf/data/corpora.yaml are Emu's batch sizes."""
    return max(1, int(data.sources[source].weight * SHARE_OF_A_BATCH))


def one_by_one(row: PackedRow) -> Iterator[PackedRow]:
    """Each document of a row as a row of its own."""
    first = 0
    for document in row.documents:
        images = row.images[first : first + len(document.image_starts)]
        first += len(images)
        yield dataclasses.replace(row, documents=[document], images=images, image_counts=[len(images)])


def prepare(batches: list[Batch], config: PretrainConfig, device: torch.device) -> Work:
    text_vocabulary, num_slots = (
        config.model.language_model.text_vocab_size,
        config.model.causal_transformer.num_queries,
    )
    inputs = [model_inputs(batch, device) for batch in batches]
    num_text = 0
    for batch in batches:
        assert not batch.failures, "every picture of the benchmark can be decoded"
        labels, same = batch.input_ids[:, 1:], batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
        num_text += int((same & (labels < text_vocabulary)).sum())
    return Work(inputs, num_text, sum(len(batch.images) for batch in batches), num_slots)


def run_pass(model: Emu, work: Work, language: Language) -> Pass:
    """Forward and backward; the model is left without gradients of before, and with those of this pass."""
    model.zero_grad()
    scales = 1 / max(1, work.num_text), 1 / max(1, work.num_images * (work.num_slots + 1))
    total = Pass()
    for inputs in work.batches:
        images = inputs["images"]
        start = now()
        made = model.encode(images if len(images) else images.new_zeros(1, *images.shape[1:]))
        visual = made.detach().requires_grad_()
        encoded = now()
        losses = language(inputs, visual, *scales)
        losses.total.backward()
        learnt = now()
        made.backward(visual.grad)
        total.vision += now() - learnt + encoded - start
        total.language += learnt - encoded
        total.text += float(losses.text)
        total.image += float(losses.image)
    return total


def assert_same_losses(ours: Pass, theirs: Pass, tolerance: float) -> None:
    """tolerance: of the difference, relative."""
    for name in ("text", "image"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert abs(a - b) <= tolerance * abs(a), f"the {name} losses of the two are not the same: {a} and {b}"
