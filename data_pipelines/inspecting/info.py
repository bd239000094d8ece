"""What is in the sources and what the mixture makes of them: counts, histograms, rows. No picture is decoded."""

from __future__ import annotations

import io
import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import av
from tqdm import tqdm

from data_pipelines.document import Cursor, Document, Frame, Image, Picture, TokenizedDocument
from data_pipelines.headers import header_size
from data_pipelines.index import Index
from data_pipelines.inspecting.settings import Opened, spread
from data_pipelines.lane import LaneSettings, Window, fill_window, first_cursor
from data_pipelines.packing import fill, tokenize_documents
from data_pipelines.reader import SourceReader
from data_pipelines.retries import UnreachableError

BOUNDS: dict[str, Sequence[float]] = {
    "tokens": (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "images": (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32),
    "short side": (0, 64, 128, 224, 256, 384, 512, 768, 1024, 2048),
    "aspect ratio": (0, 0.4, 0.6, 0.8, 0.95, 1.05, 1.25, 1.6, 2.5),
}
"""Where the bins of the histograms begin; the last one has no end. Sides in pixels, aspect ratio = width / height."""


@dataclass
class Histogram:
    """counts[i]: values from bounds[i] on, below bounds[i + 1]."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * len(self.bounds)

    def add(self, value: float) -> None:
        self.counts[bisect_right(self.bounds, value) - 1] += 1
        self.total += value

    @property
    def mean(self) -> float:
        return self.total / max(1, sum(self.counts))


@dataclass
class SourceInfo:
    """Totals by the index; histograms over the num_looked_at samples that were read; num_cut: documents cut short.

    num_unreachable: samples not looked at, because of data.skip_unreachable.
    """

    kind: str
    num_shards: int
    num_samples: int
    nbytes: int
    num_defects: int
    num_looked_at: int = 0
    num_documents: int = 0
    num_cut: int = 0
    num_unreachable: int = 0
    histograms: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram(b) for name, b in BOUNDS.items()})


@dataclass
class MixtureInfo:
    """Over num_rows rows: fill as packing defines it, tokens alone; per source what it gave."""

    weight_unit: str
    num_rows: int = 0
    fill: float = 0.0
    token_fill: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)
    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)


def source_info(reader: SourceReader, opened: Opened, max_samples: int) -> SourceInfo:
    """max_samples: read about so many samples, evenly spread over the source."""
    index, data = reader.index, opened.settings.data
    info = SourceInfo(
        data.sources[reader.name].kind, index.num_shards, index.num_samples, shard_bytes(index), index.num_defects
    )
    chunks = list(spread(index.num_chunks, -(-max_samples * index.num_chunks // index.num_samples)))
    total = sum(index.chunk(chunk).num_samples for chunk in chunks)
    max_pixels = int(data.max_image_megapixels * 1e6)
    with tqdm(total=total, desc=f"info {reader.name}", unit=" samples", disable=None) as bar:
        for chunk in chunks:
            for document in read_chunk(reader, chunk, opened, info):
                add_document(info, document, max_pixels)
            bar.update(index.chunk(chunk).num_samples)
    return info


def shard_bytes(index: Index) -> int:
    """Of all chunks: what training reads."""
    return sum(index.chunk(chunk).nbytes for chunk in range(index.num_chunks))


def read_chunk(reader: SourceReader, chunk: int, opened: Opened, info: SourceInfo) -> Iterator[TokenizedDocument]:
    settings, documents = opened.settings, []
    try:
        samples = reader.samples(chunk)
    except UnreachableError:
        if not reader.skip_unreachable:
            raise
        info.num_unreachable += reader.index.chunk(chunk).num_samples
        return
    for key, sample in samples:
        info.num_looked_at += 1
        document = reader.document(key, 0, sample)
        if isinstance(document, Document):
            documents.append((key, 0, document))
    limits = (settings.num_queries, settings.data.seq_len, settings.data.max_images_per_row)
    for result in tokenize_documents(documents, opened.tokenizer, *limits):
        if isinstance(result, TokenizedDocument):
            yield result


def add_document(info: SourceInfo, document: TokenizedDocument, max_pixels: int) -> None:
    info.num_documents += 1
    info.num_cut += document.num_truncated_tokens > 0
    info.histograms["tokens"].add(len(document.input_ids))
    info.histograms["images"].add(len(document.image_starts))
    for width, height in sizes(document.pictures or [], max_pixels):
        info.histograms["short side"].add(min(width, height))
        info.histograms["aspect ratio"].add(width / height)


def sizes(pictures: Sequence[Picture], max_pixels: int) -> Iterator[tuple[int, int]]:
    """Width and height by the header, or of the box; a video's frames count once."""
    videos = {id(picture.video): picture.video for picture in pictures if isinstance(picture, Frame)}
    for picture in pictures:
        if isinstance(picture, Image):
            left, upper, right, lower = picture.box or (0, 0, *header_size(picture.encoded, max_pixels))
            yield right - left, lower - upper
    for video in videos.values():
        with_size = video_size(video)
        if with_size:
            yield with_size


def video_size(encoded: bytes) -> tuple[int, int] | None:
    try:
        with av.open(io.BytesIO(encoded), mode="r") as container:
            codec = container.streams.video[0].codec_context
            return (codec.width, codec.height) if codec.width and codec.height else None
    except Exception:  # hostile bytes make a foreign demuxer raise almost anything; lint tells of them
        return None


def mixture_info(opened: Opened, max_rows: int) -> MixtureInfo:
    """The first rows of a few lanes, which differ from the others by chance alone: a lane is read by windows."""
    data = opened.settings.data
    info = MixtureInfo(data.weight_unit)
    total = sum(data.sources[name].weight for name in opened.indexes)
    info.weights = {name: data.sources[name].weight / total for name in opened.indexes}
    lanes = list(spread(data.lanes, -(-max_rows // data.window_rows)))
    shares = [max_rows // len(lanes) + (place < max_rows % len(lanes)) for place in range(len(lanes))]
    with tqdm(total=max_rows, desc="mixture", unit=" rows", disable=None) as bar:
        for lane, share in zip(lanes, shares, strict=True):
            for row in itertools.islice(lane_rows(lane, opened, info), share):
                add_row(info, row, data.seq_len, data.max_images_per_row)
                bar.update()
    info.fill /= max(1, info.num_rows)
    info.token_fill /= max(1, info.num_rows)
    return info


def lane_rows(lane: int, opened: Opened, info: MixtureInfo) -> Iterator[list[TokenizedDocument]]:
    """Rows of a lane, their pictures still encoded."""
    settings = opened.settings
    lane_settings = LaneSettings(
        settings.data, opened.readers(), opened.tokenizer, settings.num_queries, settings.image_size, buffer_bytes=0
    )
    cursor = first_cursor(lane, len(opened.indexes))
    while True:
        window: Window = fill_window(lane, cursor, lane_settings)
        info.skips.update({f"{source}: {reason}": count for (source, reason), count in window.skips.items()})
        yield from window.rows
        cursor = Cursor(cursor.window + 1, 0, window.positions)


def add_row(info: MixtureInfo, row: list[TokenizedDocument], seq_len: int, max_images: int) -> None:
    num_tokens = sum(len(document.input_ids) for document in row)
    num_images = sum(len(document.image_starts) for document in row)
    info.num_rows += 1
    info.fill += fill(num_tokens, num_images, seq_len, max_images)
    info.token_fill += num_tokens / seq_len
    for document in row:
        info.documents[document.key.source] += 1
        info.tokens[document.key.source] += len(document.input_ids)
        info.images[document.key.source] += len(document.image_starts)
