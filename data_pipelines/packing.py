"""Documents to rows: token ids with picture slots, best-fit-decreasing packing, and the micro-batch tensors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from data_pipelines.document import (
    Batch,
    Document,
    PackedRow,
    SampleKey,
    Skip,
    Text,
    TokenizedDocument,
)
from data_pipelines.tokenizer import Tokenizer

KeyedDocument = tuple[SampleKey, int, Document]
"""A document, the sample that it was made from, and the epoch."""


def tokenize_documents(
    documents: Sequence[KeyedDocument], tokenizer: Tokenizer, num_queries: int, seq_len: int, max_images_per_row: int
) -> list[TokenizedDocument | Skip]:
    """``<s>`` text ``[IMG]`` num_queries x ``<image>`` ``[/IMG]`` ... ``</s>``, one entry per document.

    A document of more than `seq_len` (or its own `max_tokens`) tokens or `max_images_per_row` pictures is cut: before
    the picture that does not fit, or within a text; then it has no ``</s>``.
    """
    texts = [e.text for _, _, document in documents for e in document.elements if isinstance(e, Text)]
    encoded = iter(tokenizer.encode(texts))
    slots = [tokenizer.img_start, *[tokenizer.image] * num_queries, tokenizer.img_end]
    results: list[TokenizedDocument | Skip] = []
    for key, epoch, document in documents:
        pieces = [next(encoded) if isinstance(e, Text) else slots for e in document.elements]
        limit = min(seq_len, document.max_tokens or seq_len)
        ids, starts, num_truncated = _lay_out(document, pieces, tokenizer, limit, max_images_per_row)
        if len(ids) <= 1 + (num_truncated == 0):
            results.append(Skip("no text and no picture"))
            continue
        pictures = [e for e in document.elements if not isinstance(e, Text)][: len(starts)]
        results.append(
            TokenizedDocument(key, epoch, np.array(ids, np.int32), starts, pictures, num_truncated_tokens=num_truncated)
        )
    return results


def _lay_out(
    document: Document, pieces: list[list[int]], tokenizer: Tokenizer, limit: int, max_images: int
) -> tuple[list[int], list[int], int]:
    """Token ids, positions of ``[IMG]``, and how many tokens were cut off."""
    full_length = 2 + sum(map(len, pieces))
    ids = [tokenizer.bos]
    starts: list[int] = []
    for element, piece in zip(document.elements, pieces, strict=True):
        if isinstance(element, Text):
            ids.extend(piece)
        elif len(starts) == max_images or len(ids) + len(piece) > limit:
            break
        else:
            starts.append(len(ids))
            ids.extend(piece)
    else:
        ids.append(tokenizer.eos)
    ids = ids[:limit]
    return ids, starts, full_length - len(ids)


def fill(num_tokens: int, num_images: int, seq_len: int, max_images_per_row: int) -> float:
    """How full a row is: the larger share of its two limits."""
    return max(num_tokens / seq_len, num_images / max_images_per_row)


def pack(documents: Sequence[TokenizedDocument], seq_len: int, max_images_per_row: int) -> list[list[int]]:
    """Rows of document numbers by best-fit decreasing: the fullest documents first, each into the fullest row it fits.

    Rows are kept by free places for pictures and, within those, free tokens as bits of one integer, so that a document
    costs O(max_images_per_row) steps whatever the number of rows.
    """
    sizes = [(len(document.input_ids), len(document.image_starts)) for document in documents]
    order = sorted(range(len(sizes)), key=lambda d: (-fill(*sizes[d], seq_len, max_images_per_row), -sizes[d][0], d))
    rows: list[list[int]] = []
    open_rows = _OpenRows(max_images_per_row)
    for d in order:
        num_tokens, num_images = sizes[d]
        row, free_tokens, free_images = open_rows.take_best(num_tokens, num_images) or (
            len(rows),
            seq_len,
            max_images_per_row,
        )
        if row == len(rows):
            rows.append([])
        rows[row].append(d)
        open_rows.put(row, free_tokens - num_tokens, free_images - num_images)
    return rows


class _OpenRows:
    def __init__(self, max_images: int) -> None:
        self._free_tokens = [0] * (max_images + 1)  # bit t of entry i: some row has t tokens and i pictures free
        self._rows: dict[tuple[int, int], list[int]] = {}

    def put(self, row: int, free_tokens: int, free_images: int) -> None:
        self._free_tokens[free_images] |= 1 << free_tokens
        self._rows.setdefault((free_images, free_tokens), []).append(row)

    def take_best(self, num_tokens: int, num_images: int) -> tuple[int, int, int] | None:
        """Row, its free tokens and free pictures; least free tokens first, then least free pictures."""
        candidates = []
        for free_images in range(num_images, len(self._free_tokens)):
            fitting = self._free_tokens[free_images] >> num_tokens
            if fitting:
                candidates.append((num_tokens + (fitting & -fitting).bit_length() - 1, free_images))
        if not candidates:
            return None
        free_tokens, free_images = min(candidates)
        rows = self._rows[free_images, free_tokens]
        row = rows.pop()
        if not rows:
            self._free_tokens[free_images] ^= 1 << free_tokens
        return row, free_tokens, free_images


def collate(rows: Sequence[PackedRow], seq_len: int, pad: int, source_names: Sequence[str]) -> Batch:
    """One micro-batch of the rows in the order given; `source_names` in the order of the source numbers.

    A document is ok as far as this rank can tell; it has not seen the pictures of the others of its group.
    """
    input_ids = np.full((len(rows), seq_len), pad, np.int64)
    document_ids = np.zeros((len(rows), seq_len), np.int32)
    position_ids = np.zeros((len(rows), seq_len), np.int64)
    max_documents = max(len(row.documents) for row in rows)
    sources = np.full((len(rows), max_documents), -1, np.int64)
    document_ok = np.zeros((len(rows), max_documents), bool)
    starts_by_rank: list[list[tuple[int, int]]] = [[] for _ in rows[0].image_counts]
    failures: dict[tuple[int, int], str] = {}
    for r, row in enumerate(rows):
        begin = 0
        starts: list[tuple[int, int]] = []
        for d, document in enumerate(row.documents):
            end = begin + len(document.input_ids)
            input_ids[r, begin:end] = document.input_ids
            document_ids[r, begin:end] = d + 1
            position_ids[r, begin:end] = np.arange(end - begin)
            sources[r, d] = source_names.index(document.key.source)
            document_ok[r, d] = d not in row.failures
            starts.extend((r, begin + start) for start in document.image_starts)
            begin = end
        for of_rank, count in zip(starts_by_rank, row.image_counts, strict=True):
            of_rank += starts[:count]
            del starts[:count]
        failures |= {(r, d): reason for d, reason in row.failures.items()}
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        document_ids=torch.from_numpy(document_ids),
        position_ids=torch.from_numpy(position_ids),
        images=rows[0].images if len(rows) == 1 else torch.cat([row.images for row in rows]),  # not copied alone
        image_starts=torch.tensor(list(itertools.chain(*starts_by_rank)), dtype=torch.int64).reshape(-1, 2),
        image_counts=list(map(len, starts_by_rank)),
        document_sources=torch.from_numpy(sources),
        document_ok=torch.from_numpy(document_ok),
        keys=[[document.key for document in row.documents] for row in rows],
        cursors={row.lane: row.cursor for row in rows},
        failures=failures,
        skips=dict(sum((Counter(row.skips) for row in rows), Counter())),
    )
