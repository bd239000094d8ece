"""A lane: one of the independent streams of rows that the global batch is made of, a pure function of its cursor."""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch

from data_pipelines.config import DataConfig
from data_pipelines.document import (
    Cursor,
    Document,
    Frame,
    PackedRow,
    Picture,
    SampleKey,
    Skip,
    Text,
    TokenizedDocument,
)
from data_pipelines.images import DecodeError
from data_pipelines.mixture import Mixture, TokenShare
from data_pipelines.order import permute
from data_pipelines.packing import pack, tokenize_documents
from data_pipelines.pictures import decode_pictures
from data_pipelines.reader import SourceReader, SourceStream
from data_pipelines.tokenizer import Tokenizer

DOCUMENTS_PER_DRAW = 32
MIN_FIRST_WINDOW_ROWS = 8

SkipCounts = Counter[tuple[str, str]]


@dataclass
class LaneSettings:
    """What all lanes of a rank share.

    readers: the sources of the mixture in order; buffer_bytes: encoded pictures that one lane may hold.
    """

    config: DataConfig
    readers: Sequence[SourceReader]
    tokenizer: Tokenizer
    num_queries: int
    image_size: int
    buffer_bytes: int

    def __post_init__(self) -> None:
        weights = [self.config.sources[reader.name].weight for reader in self.readers]
        self.mixture = Mixture(weights, self.config.seed)


@dataclass
class Window:
    """Packed rows of documents in the order in which they leave; positions: of the sources behind the window."""

    rows: list[list[TokenizedDocument]]
    positions: tuple[tuple[int, int], ...]
    skips: SkipCounts


class Lane:
    """Endless rows of lane `number` from a cursor on; a fresh lane begins at `first_cursor`."""

    def __init__(self, number: int, settings: LaneSettings, cursor: Cursor) -> None:
        self.number = number
        self._settings = settings
        self._cursor = cursor
        self._window: Window | None = None

    def next_row(self) -> PackedRow:
        while self._window is None:
            self._window = fill_window(self.number, self._cursor, self._settings)
            if not self._window.rows:  # small shares of tokens: each source put its first document back
                self._advance(self._window)
        window, row = self._window, self._cursor.row
        documents, window.rows[row] = window.rows[row], []  # the encoded pictures are no longer held
        skips = Counter(window.skips) if row == 0 else Counter()
        images, document_ok = self._decode(documents, skips)
        self._advance(window)
        emitted = [dataclasses.replace(document, pictures=None) for document in documents]
        return PackedRow(self.number, self._cursor, emitted, images, document_ok, dict(skips))

    def _advance(self, window: Window) -> None:
        self._cursor = dataclasses.replace(self._cursor, row=self._cursor.row + 1)
        if self._cursor.row >= len(window.rows):
            self._cursor = Cursor(self._cursor.window + 1, 0, window.positions)
            self._window = None

    def _decode(self, documents: list[TokenizedDocument], skips: SkipCounts) -> tuple[torch.Tensor, list[bool]]:
        """Images uint8 [M, 3, H, W] of a row, blank where a picture is broken, and which documents are whole."""
        size, max_pixels = self._settings.image_size, int(self._settings.config.max_image_megapixels * 1e6)
        pictures = [self._pictures_of(document) for document in documents]
        decoded = iter(decode_pictures([p for several in pictures for p in several], size, max_pixels))
        images = np.zeros((sum(map(len, pictures)), 3, size, size), np.uint8)
        document_ok, position = [], 0
        for document, several in zip(documents, pictures, strict=True):
            reasons = []
            for _ in several:
                image = next(decoded)
                if isinstance(image, DecodeError):
                    reasons.append(image.reason)
                else:
                    images[position] = image
                position += 1
            document_ok.append(not reasons)
            if reasons:
                skips[document.key.source, reasons[0]] += 1
        return torch.from_numpy(images), document_ok

    def _pictures_of(self, document: TokenizedDocument) -> Sequence[Picture]:
        if document.pictures is not None:
            return document.pictures
        reader = next(r for r in self._settings.readers if r.name == document.key.source)
        again = reader.document_of(document.key, document.epoch)
        assert isinstance(again, Document), "a source must be a pure function"
        return [e for e in again.elements if not isinstance(e, Text)][: len(document.image_starts)]


def first_cursor(lane: int, num_sources: int) -> Cursor:
    return Cursor(window=0, row=0, sources=((lane, 0),) * num_sources)


def fill_window(lane: int, cursor: Cursor, settings: LaneSettings) -> Window:
    """The window that a cursor stands in. Documents that cannot be used are replaced by their source's next ones."""
    config = settings.config
    streams = [
        SourceStream(reader, config.lanes, position)
        for reader, position in zip(settings.readers, cursor.sources, strict=True)
    ]
    draw = _draw_by_tokens if config.weight_unit == "tokens" else _draw_by_documents
    documents: list[TokenizedDocument] = []
    free_bytes = settings.buffer_bytes
    for document in draw(lane, cursor.window, streams, settings):
        free_bytes -= _hold(document, free_bytes)
        documents.append(document)
    return Window(
        rows=_shuffled_rows(lane, cursor.window, documents, config),
        positions=tuple(stream.position for stream in streams),
        skips=Counter({(s.reader.name, reason): n for s in streams for reason, n in s.skips.items()}),
    )


def _window_tokens(lane: int, window: int, config: DataConfig) -> int:
    """The first windows are of different lengths: else all lanes would be refilled at the same step."""
    rows = config.window_rows
    if window == 0:
        rows = min(rows, max(MIN_FIRST_WINDOW_ROWS, rows * (lane + 1) // config.lanes))
    return rows * config.seq_len


def _draw_by_documents(
    lane: int, window: int, streams: list[SourceStream], settings: LaneSettings
) -> Iterator[TokenizedDocument]:
    num_drawn, num_tokens = 0, 0
    while num_tokens < _window_tokens(lane, window, settings.config):
        numbers = range(num_drawn, num_drawn + DOCUMENTS_PER_DRAW)
        for document in _draw([streams[settings.mixture.source(lane, window, n)] for n in numbers], settings):
            num_tokens += len(document.input_ids)
            yield document
        num_drawn += DOCUMENTS_PER_DRAW


def _draw_by_tokens(
    lane: int, window: int, streams: list[SourceStream], settings: LaneSettings
) -> Iterator[TokenizedDocument]:
    """The next document is always that of the source whose share it fills least."""
    num_tokens = _window_tokens(lane, window, settings.config)
    shares = [settings.mixture.token_share(lane, window, source, num_tokens) for source in range(len(streams))]
    drawn = [_draw_share(stream, share, settings) for stream, share in zip(streams, shares, strict=True)]
    return (document for _, document in heapq.merge(*drawn, key=itemgetter(0)))


def _draw_share(
    stream: SourceStream, share: TokenShare, settings: LaneSettings
) -> Iterator[tuple[float, TokenizedDocument]]:
    """Documents of one source, each with the fraction of the share that it fills up; the first too many is put back."""
    while True:
        mark = stream.mark()
        num_sure = min(share.num_left // settings.config.seq_len, DOCUMENTS_PER_DRAW)
        for document in _draw([stream] * max(1, num_sure), settings):
            if not share.take(len(document.input_ids)):  # only ever a document drawn alone
                stream.go_back(mark)
                return
            yield share.fraction, document


def _draw(wanted: list[SourceStream], settings: LaneSettings) -> Iterator[TokenizedDocument]:
    """A document of each of the streams."""
    while wanted:
        drawn = [stream.next_document() for stream in wanted]
        refused = []
        for stream, document in zip(wanted, _tokenize(drawn, settings), strict=True):
            if isinstance(document, Skip):
                stream.skip(document.reason)
                refused.append(stream)
            else:
                stream.accept()
                yield document
        wanted = refused


def _tokenize(drawn: list[tuple[SampleKey, int, Document]], settings: LaneSettings) -> list[TokenizedDocument | Skip]:
    config = settings.config
    return tokenize_documents(
        drawn, settings.tokenizer, settings.num_queries, config.seq_len, config.max_images_per_row
    )


def _hold(document: TokenizedDocument, free_bytes: int) -> int:
    """Encoded bytes that the document holds from now on; beyond the free ones it lets its pictures go."""
    pictures = document.pictures or []
    files = {id(file): file for file in (p.video if isinstance(p, Frame) else p.encoded for p in pictures)}
    nbytes = sum(map(len, files.values()))
    if nbytes <= free_bytes:
        return nbytes
    document.pictures = None
    return 0


def _shuffled_rows(
    lane: int, window: int, documents: list[TokenizedDocument], config: DataConfig
) -> list[list[TokenizedDocument]]:
    """Packed rows in a keyed order: packing puts the longest documents first."""
    rows = pack(documents, config.seq_len, config.max_images_per_row)
    key = ("rows", config.seed, lane, window)
    return [[documents[d] for d in rows[permute(key, len(rows), row)]] for row in range(len(rows))]
