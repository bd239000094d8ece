"""Packed rows as the model sees them: which positions belong to which document, and what is supervised where."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import PIL.Image
from torch import Tensor

from data_pipelines.document import Batch, SampleKey
from data_pipelines.tokenizer import Tokenizer

TEXT_TARGET, IMAGE_TARGET, NO_TARGET = "text", "image", "none"
TEXT, IMAGE = "text", "image"
THUMBNAIL = 96


@dataclass(frozen=True)
class Run:
    """Neighbouring positions of one kind."""

    kind: str
    length: int


@dataclass(frozen=True)
class Piece:
    """A text, or a picture (thumbnail); num_targets: positions of it that the model learns to predict."""

    num_targets: int
    text: str = ""
    picture: PIL.Image.Image | None = None

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        assert self.picture is not None
        file = io.BytesIO()
        self.picture.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass
class PackedDocument:
    """layout: positions that are text or image slots, in order; ok: no picture of it is broken."""

    key: SampleKey
    length: int
    ok: bool
    layout: list[Run] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def num_pictures(self) -> int:
        return sum(piece.picture is not None for piece in self.pieces)


@dataclass
class ShownRow:
    """targets: what each position of the row is supervised to predict."""

    documents: list[PackedDocument]
    targets: list[Run]
    num_padding: int

    @property
    def length(self) -> int:
        return sum(document.length for document in self.documents) + self.num_padding

    @property
    def num_pictures(self) -> int:
        return sum(document.num_pictures for document in self.documents)


def show_row(batch: Batch, row: int, num_queries: int, tokenizer: Tokenizer) -> ShownRow:
    """num_queries: embeddings of a picture."""
    targets = target_kinds(batch, row, num_queries, tokenizer)
    images = iter(batch.images[batch.image_starts[:, 0] == row])
    documents = []
    for number, key in enumerate(batch.keys[row], start=1):
        where = (batch.document_ids[row] == number).numpy()
        ids = batch.input_ids[row].numpy()[where]
        document = PackedDocument(key, len(ids), bool(batch.document_ok[row, number - 1]))
        document.layout = runs(np.where(ids >= tokenizer.img_start, IMAGE, TEXT))
        document.pieces = show_pieces(ids, targets[where], images, tokenizer)
        documents.append(document)
    return ShownRow(documents, runs(targets), int((batch.document_ids[row] == 0).sum()))


def target_kinds(batch: Batch, row: int, num_queries: int, tokenizer: Tokenizer) -> np.ndarray:
    """[S]: which loss each position is a target of.

    Words and ``</s>`` are learnt as text, ``<image>`` slots and ``[/IMG]`` by regression; the first position of a
    document, ``[IMG]`` and padding are not learnt, nor is anything of a document with a broken picture.
    """
    ids, documents = batch.input_ids[row].numpy(), batch.document_ids[row].numpy()
    ok = np.concatenate([[False], batch.document_ok[row].numpy()])[documents]
    follows = np.concatenate([[False], documents[1:] == documents[:-1]])
    kinds = np.full(len(ids), NO_TARGET, dtype="<U5")
    kinds[ok & follows & (ids < tokenizer.pad)] = TEXT_TARGET
    for start in batch.image_starts[batch.image_starts[:, 0] == row, 1].tolist():
        if ok[start]:
            kinds[start + 1 : start + num_queries + 2] = IMAGE_TARGET
    return kinds


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
        pieces.append(Piece(num_targets, picture=thumbnail(next(images))))
        position = end
    pieces.append(text_piece(ids[position:], targets[position:], tokenizer))
    return [piece for piece in pieces if piece.text or piece.picture]


def text_piece(ids: np.ndarray, targets: np.ndarray, tokenizer: Tokenizer) -> Piece:
    return Piece(int((targets == TEXT_TARGET).sum()), text=tokenizer.decode(ids.tolist()))


def thumbnail(image: Tensor) -> PIL.Image.Image:
    """uint8 [3, H, W]."""
    picture = PIL.Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture
