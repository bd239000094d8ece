"""Held-out documents as rows for validation: a choice that depends on the corpus and the settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.document import Batch, Cursor, PackedRow, SampleKey, Skip, TokenizedDocument
from data_pipelines.lane import LaneSettings, decode_images, share_images
from data_pipelines.packing import collate, fill, pack, tokenize_documents
from data_pipelines.reader import SourceReader
from data_pipelines.retries import UnreachableError
from data_pipelines.tokenizer import Tokenizer

PAIR_TEXT_TOKENS = 256
"""So much of a text stands before its picture at most, that rows stay short."""


class HeldOutRow(NamedTuple):
    """number: among all rows of its kind, over all ranks."""

    number: int
    documents: list[TokenizedDocument]


def read_held_out(reader: SourceReader, chunk: int, settings: LaneSettings) -> list[TokenizedDocument]:
    """The held-out documents of a chunk in its order; none where its store does not answer and that is allowed.

    Raises UnreachableError, or UserError when the shard is not the one that was indexed.
    """
    try:
        held_out = reader.held_out(chunk)
    except UnreachableError:
        if not reader.skip_unreachable:
            raise
        return []
    config = settings.config
    tokenized = tokenize_documents(
        [(key, 0, document) for key, document in held_out],
        settings.tokenizer,
        settings.num_queries,
        config.seq_len,
        config.max_images_per_row,
    )
    return [document for document in tokenized if not isinstance(document, Skip)]


def num_enough(documents: Sequence[TokenizedDocument], num_rows: int, config: DataConfig) -> int | None:
    """How many of the documents, from the first on, fill so many rows; None if all of them do not."""
    filled = 0.0
    for number, document in enumerate(documents, start=1):
        filled += fill(len(document.input_ids), len(document.image_starts), config.seq_len, config.max_images_per_row)
        if filled >= num_rows:
            return number
    return None


def pack_first(
    documents: Sequence[TokenizedDocument], num_rows: int, config: DataConfig
) -> list[list[TokenizedDocument]]:
    """At most so many rows, of the first documents: leaving out rows would leave out the short documents instead."""
    while len(rows := pack(documents, config.seq_len, config.max_images_per_row)) > num_rows:
        documents = documents[:-1]
    return [[documents[d] for d in row] for row in rows]


def text_of(document: TokenizedDocument, num_queries: int) -> list[int]:
    """The ids of a document without ``<s>``, ``</s>`` and the slots of its pictures."""
    ids = document.input_ids.tolist()
    if document.num_truncated_tokens == 0:
        ids.pop()
    for start in reversed(document.image_starts):
        del ids[start : start + num_queries + 2]
    return ids[1:]


def is_pair(document: TokenizedDocument, num_queries: int) -> bool:
    """Whether it is one picture with some text."""
    return len(document.image_starts) == 1 and bool(text_of(document, num_queries))


def text_first(document: TokenizedDocument, tokenizer: Tokenizer, num_queries: int, seq_len: int) -> TokenizedDocument:
    """A pair with its picture behind its text, whatever its own order is: a text as long as a row is cut."""
    text = text_of(document, num_queries)[: min(PAIR_TEXT_TOKENS, seq_len - num_queries - 4)]
    ids = [tokenizer.bos, *text, *_slots(tokenizer, num_queries), tokenizer.eos]
    return _laid_out(document, ids, 1 + len(text))


def to_be_continued(
    document: TokenizedDocument, tokenizer: Tokenizer, num_queries: int, num_tokens: int
) -> TokenizedDocument:
    """The picture of a pair, and behind it places for so many tokens of text."""
    ids = [tokenizer.bos, *_slots(tokenizer, num_queries), *[0] * num_tokens]
    return _laid_out(document, ids, 1)


def _slots(tokenizer: Tokenizer, num_queries: int) -> list[int]:
    return [tokenizer.img_start, *[tokenizer.image] * num_queries, tokenizer.img_end]


def _laid_out(document: TokenizedDocument, ids: list[int], image_start: int) -> TokenizedDocument:
    return TokenizedDocument(document.key, document.epoch, np.array(ids, np.int32), [image_start], document.pictures)


def make_batch(rows: Sequence[HeldOutRow], settings: LaneSettings, source_names: Sequence[str], length: int) -> Batch:
    """The rows with this rank's pictures decoded, `length` positions each; without any, one blank row.

    The blank one has one document, which is not ok and so has no targets.
    """
    packed = [_decoded(row, settings) for row in rows] or [_blank(settings, source_names[0])]
    return collate(packed, length, settings.tokenizer.pad, source_names)


def _decoded(row: HeldOutRow, settings: LaneSettings) -> PackedRow:
    num_images = sum(len(document.image_starts) for document in row.documents)
    counts = share_images(row.number, num_images, settings.tp_size)
    images, failures = decode_images(row.documents, counts, settings)
    return PackedRow(row.number, Cursor(0, 0, ()), row.documents, images, counts, failures)


def _blank(settings: LaneSettings, source: str) -> PackedRow:
    ids = np.array([settings.tokenizer.bos, settings.tokenizer.eos], np.int32)
    document = TokenizedDocument(SampleKey(source, 0, 0), 0, ids, [], [])
    counts = [0] * settings.tp_size
    images, _ = decode_images([], counts, settings)
    return PackedRow(0, Cursor(0, 0, ()), [document], images, counts, {0: "blank"})
