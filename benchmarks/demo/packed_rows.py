"""Packed rows as the model sees them: which positions belong to which document, and what is supervised where."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np
import PIL.Image
from torch import Tensor

from data_pipelines.document import Batch
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.tokenizer import Tokenizer
from models.objective import find_targets
from trainer.config import PretrainConfig

NUM_SHOWN = 3
TEXT_TARGET, IMAGE_TARGET, NO_TARGET = "text", "image", "none"


@dataclass(frozen=True)
class Run:
    """Neighbouring positions of one kind."""

    kind: str
    length: int


@dataclass(frozen=True)
class Piece:
    """A text, or a picture (data URI); num_targets: positions of it that the model learns to predict."""

    num_targets: int
    text: str = ""
    picture: str = ""


@dataclass
class PackedDocument:
    """layout: positions that are text or image slots, in order."""

    source: str
    length: int
    layout: list[Run] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class ShownRow:
    """targets: what each position of the row is supervised to predict."""

    documents: list[PackedDocument]
    targets: list[Run]
    num_padding: int


@dataclass(frozen=True)
class RowSample:
    """The first rows of a training run, and how many documents of each source were in how many of them."""

    shown: list[ShownRow]
    documents: Counter[str]
    num_rows: int


def read_rows(config: PretrainConfig, num_steps: int) -> RowSample:
    """The rows of the run's first steps, read again by its own loader."""
    config.data.num_workers = 0
    tokenizer = Tokenizer(config.data.tokenizer)
    loader = Loader(
        config.data,
        open_indexes(config.data, build_missing=False),
        tokenizer,
        num_queries=config.model.causal_transformer.num_queries,
        image_size=config.model.vision.image_size,
        dp_rank=0,
        dp_size=1,
    )
    num_batches = num_steps * config.data.global_batch_rows // config.data.micro_batch_rows
    batches = list(islice(loader, num_batches))
    documents = Counter(key.source for batch in batches for keys in batch.keys for key in keys)
    shown = [show_row(batches[b], r, config, tokenizer) for b, r in choose_rows(batches)]
    return RowSample(shown, documents, sum(len(batch.keys) for batch in batches))


def choose_rows(batches: Sequence[Batch]) -> list[tuple[int, int]]:
    """(batch, row) of a few rows that together show most sources, and each many."""
    sources = {
        (b, r): {key.source for key in keys} for b, batch in enumerate(batches) for r, keys in enumerate(batch.keys)
    }
    chosen: list[tuple[int, int]] = []
    seen: set[str] = set()
    while len(chosen) < NUM_SHOWN and len(chosen) < len(sources):
        left = (place for place in sources if place not in chosen)
        best = max(left, key=lambda place: (len(sources[place] - seen), len(sources[place])))
        chosen.append(best)
        seen |= sources[best]
    return chosen


def show_row(batch: Batch, row: int, config: PretrainConfig, tokenizer: Tokenizer) -> ShownRow:
    targets = target_kinds(batch, config)[row]
    images = iter(batch.images[batch.image_starts[:, 0] == row])
    documents = []
    for number, key in enumerate(batch.keys[row], start=1):
        where = (batch.document_ids[row] == number).numpy()
        ids = batch.input_ids[row].numpy()[where]
        document = PackedDocument(key.source, len(ids))
        kinds = np.where(ids >= tokenizer.img_start, "image", "text")
        document.layout = runs(kinds)
        document.pieces = show_pieces(ids, targets[where], images, tokenizer)
        documents.append(document)
    return ShownRow(documents, runs(targets), int((batch.document_ids[row] == 0).sum()))


def target_kinds(batch: Batch, config: PretrainConfig) -> np.ndarray:
    """[B, S]: which loss each position is a target of, by the objective's own rule."""
    targets = find_targets(
        batch.input_ids,
        batch.document_ids,
        batch.document_ok,
        batch.document_sources,
        batch.image_starts,
        config.model.causal_transformer.num_queries,
        config.model.language_model.text_vocab_size,
    )
    kinds = np.full(batch.input_ids.numel(), NO_TARGET, dtype="<U5")
    kinds[targets.text_positions.numpy() + 1] = TEXT_TARGET
    kinds[targets.image_positions.numpy() + 1] = IMAGE_TARGET
    return kinds.reshape(batch.input_ids.shape)


def runs(kinds: np.ndarray) -> list[Run]:
    return [Run(str(kind), len(list(group))) for kind, group in groupby(kinds)]


def show_pieces(ids: np.ndarray, targets: np.ndarray, images: Iterator[Tensor], tokenizer: Tokenizer) -> list[Piece]:
    """Texts and pictures of one document in reading order."""
    starts = (ids == tokenizer.img_start).nonzero()[0]
    ends = (ids == tokenizer.img_end).nonzero()[0] + 1
    pieces, position = [], 0
    for start, end in zip(starts, ends, strict=True):
        pieces.append(text_piece(ids[position:start], targets[position:start], tokenizer))
        num_targets = int((targets[start:end] == IMAGE_TARGET).sum())
        pieces.append(Piece(num_targets, picture=png_uri(next(images))))
        position = end
    pieces.append(text_piece(ids[position:], targets[position:], tokenizer))
    return [piece for piece in pieces if piece.text or piece.picture]


def text_piece(ids: np.ndarray, targets: np.ndarray, tokenizer: Tokenizer) -> Piece:
    return Piece(int((targets == TEXT_TARGET).sum()), text=tokenizer.decode(ids.tolist()))


def png_uri(image: Tensor) -> str:
    """uint8 [3, H, W]."""
    file = io.BytesIO()
    PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
