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
from data_pipelines.mixture import Mixture, TokenShare
from data_pipelines.order import permute
from data_pipelines.packing import pack, tokenize_documents
from data_pipelines.pictures import blank_images, decode_into
from data_pipelines.reader import UNREACHABLE, SourceReader, SourceStream
from data_pipelines.retries import UnreachableError
from data_pipelines.tokenizer import Tokenizer

DOCUMENTS_PER_DRAW = 32
MIN_WINDOW_ROWS = 8
ROWS_AHEAD = 4
"""So many rows before a window ends, the first chunks of the next one are fetched."""

SkipCounts = Counter[tuple[str, str]]


@dataclass
class LaneSettings:
    """What all lanes of a rank share.

    readers: the sources of the mixture in order; buffer_bytes: encoded pictures that one lane may hold; tp_rank,
    tp_size: place in the tensor-parallel group, each rank of which decodes a part of a row's pictures.
    """

    config: DataConfig
    readers: Sequence[SourceReader]
    tokenizer: Tokenizer
    num_queries: int
    image_size: int
    buffer_bytes: int
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        weights = [self.config.sources[reader.name].weight for reader in self.readers]
        self.mixture = Mixture(weights, self.config.seed)


@dataclass
class Window:
    """Packed rows of documents in the order in which they leave; positions: of the sources behind the window.

    unreachable: (source number, q) of the units that were passed over.
    """

    rows: list[list[TokenizedDocument]]
    positions: tuple[tuple[int, int], ...]
    unreachable: tuple[tuple[int, int], ...]
    skips: SkipCounts


class Lane:
    """Endless rows of lane `number` from a cursor on; a fresh lane begins at `first_cursor`."""

    def __init__(self, number: int, settings: LaneSettings, cursor: Cursor) -> None:
        self.number = number
        self._settings = settings
        self._cursor = cursor
        self._window: Window | None = None

    def next_row(self, out: np.ndarray | None = None) -> PackedRow:
        """out: uint8 [at least m, 3, H, W], where this rank's m images are to be; None = in memory of their own."""
        if self._window is not None and self._cursor.row == len(self._window.rows) - ROWS_AHEAD:
            self._expect(self._window.positions)
        while self._window is None:
            self._window = fill_window(self.number, self._cursor, self._settings)
            self._cursor = dataclasses.replace(self._cursor, unreachable=self._window.unreachable)
            if not self._window.rows:  # small shares of tokens: each source put its first document back
                self._advance(self._window)
        window, row = self._window, self._cursor.row
        documents, window.rows[row] = window.rows[row], []  # the encoded pictures are no longer held
        skips = Counter(window.skips) if row == 0 else Counter()
        unreachable = window.unreachable if row == 0 else ()
        counts = share_images(
            self.number, sum(len(document.image_starts) for document in documents), self._settings.tp_size
        )
        images, failures = decode_images(documents, counts, self._settings, out)
        self._advance(window)
        emitted = [dataclasses.replace(document, pictures=None) for document in documents]
        return PackedRow(self.number, self._cursor, emitted, images, counts, failures, dict(skips), unreachable)

    def expect_window(self) -> None:
        """Begin to fetch the chunks that the next row needs."""
        self._expect(self._cursor.sources)

    def _expect(self, positions: Sequence[tuple[int, int]]) -> None:
        for reader, (q, _), weight in zip(
            self._settings.readers, positions, self._settings.mixture.weights, strict=True
        ):
            if weight:
                reader.expect(reader.units.unit(q).chunk)

    def _advance(self, window: Window) -> None:
        self._cursor = dataclasses.replace(self._cursor, row=self._cursor.row + 1)
        if self._cursor.row >= len(window.rows):
            self._cursor = Cursor(self._cursor.window + 1, 0, window.positions)
            self._window = None


def decode_images(
    documents: Sequence[TokenizedDocument], counts: list[int], settings: LaneSettings, out: np.ndarray | None = None
) -> tuple[torch.Tensor, dict[int, str]]:
    """This rank's images uint8 [m, 3, H, W] of a row, blank where a picture is broken, and by document why its first
    broken one is.

    counts: m of every rank of the tensor-parallel group, see `share_images`. out: as for `Lane.next_row`.
    """
    first, num_own = sum(counts[: settings.tp_rank]), counts[settings.tp_rank]
    images = blank_images(num_own, settings.image_size) if out is None else out[:num_own]
    pictures: list[Picture] = []
    places: list[tuple[int, int]] = []  # position among the own images, document
    failures: list[tuple[int, int, str]] = []
    position = -first
    for d, document in enumerate(documents):
        own = range(max(0, -position), min(len(document.image_starts), num_own - position))
        if own:
            several = pictures_of(document, settings)
            if several is None:
                failures.append((position + own[0], d, UNREACHABLE))
                images[position + own[0] : position + own[-1] + 1] = 0
            else:
                pictures += [several[i] for i in own]
                places += [(position + i, d) for i in own]
        position += len(document.image_starts)
    errors = decode_into([images[i] for i, _ in places], pictures, int(settings.config.max_image_megapixels * 1e6))
    failures += [(*places[place], error.reason) for place, error in errors.items()]
    return torch.from_numpy(images), {d: reason for _, d, reason in sorted(failures, reverse=True)}


def pictures_of(document: TokenizedDocument, settings: LaneSettings) -> Sequence[Picture] | None:
    """None where they would have to be read again and their store does not answer."""
    if document.pictures is not None:
        return document.pictures
    reader = next(r for r in settings.readers if r.name == document.key.source)
    try:
        again = reader.document_of(document.key, document.epoch)
    except UnreachableError:
        if not reader.skip_unreachable:
            raise
        return None
    assert isinstance(again, Document), "a source must be a pure function"
    return [e for e in again.elements if not isinstance(e, Text)][: len(document.image_starts)]


def share_images(lane: int, num_images: int, tp_size: int) -> list[int]:
    """How many images of a row each rank of the tensor-parallel group decodes and encodes: in reading order, so that
    the frames of a video stay together, and what is left over in turn by lane."""
    whole, left = divmod(num_images, tp_size)
    return [whole + ((rank + lane) % tp_size < left) for rank in range(tp_size)]


def first_cursor(lane: int, num_sources: int) -> Cursor:
    return Cursor(window=0, row=0, sources=((lane, 0),) * num_sources)


def fill_window(lane: int, cursor: Cursor, settings: LaneSettings) -> Window:
    """The window that a cursor stands in. Documents that cannot be used are replaced by their source's next ones."""
    config = settings.config
    streams = [
        SourceStream(reader, config.lanes, position, (q for source, q in cursor.unreachable if source == number))
        for number, (reader, position) in enumerate(zip(settings.readers, cursor.sources, strict=True))
    ]
    mixture = Mixture(cursor.weights, config.seed) if cursor.weights else settings.mixture
    draw = _draw_by_tokens if config.weight_unit == "tokens" else _draw_by_documents
    documents: list[TokenizedDocument] = []
    free_bytes = settings.buffer_bytes
    for document in draw(lane, cursor.window, streams, mixture, settings):
        free_bytes -= hold_pictures(document, free_bytes)
        documents.append(document)
    return Window(
        rows=_shuffled_rows(lane, cursor.window, documents, config),
        positions=tuple(stream.position for stream in streams),
        unreachable=tuple((number, q) for number, stream in enumerate(streams) for q in sorted(stream.unreachable)),
        skips=Counter({(s.reader.name, reason): n for s in streams for reason, n in s.skips.items()}),
    )


def _window_tokens(lane: int, window: int, config: DataConfig) -> int:
    """The second windows are of different lengths: else all lanes would be refilled at the same step for ever."""
    rows = config.window_rows
    if window == 1:
        rows = min(rows, max(MIN_WINDOW_ROWS, rows * (lane + 1) // config.lanes))
    return rows * config.seq_len


def _draw_by_documents(
    lane: int, window: int, streams: list[SourceStream], mixture: Mixture, settings: LaneSettings
) -> Iterator[TokenizedDocument]:
    num_drawn, num_tokens = 0, 0
    num_wanted = _window_tokens(lane, window, settings.config)
    while num_tokens < num_wanted:
        for stream in streams if num_tokens else ():
            stream.read_ahead(num_tokens / num_wanted)
        numbers = range(num_drawn, num_drawn + DOCUMENTS_PER_DRAW)
        for document in _draw([streams[mixture.source(lane, window, n)] for n in numbers], settings):
            num_tokens += len(document.input_ids)
            yield document
        num_drawn += DOCUMENTS_PER_DRAW


def _draw_by_tokens(
    lane: int, window: int, streams: list[SourceStream], mixture: Mixture, settings: LaneSettings
) -> Iterator[TokenizedDocument]:
    """The next document is always that of the source whose share it fills least."""
    num_tokens = _window_tokens(lane, window, settings.config)
    drawn = [
        _draw_share(stream, mixture.token_share(lane, window, number, num_tokens), settings)
        for number, stream in enumerate(streams)
        if mixture.weights[number]
    ]
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
        if share.fraction:
            stream.read_ahead(share.fraction)


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


def hold_pictures(document: TokenizedDocument, free_bytes: int) -> int:
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
