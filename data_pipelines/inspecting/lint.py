"""What is broken in the shards: every sample read as training reads it, some of its pictures decoded."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from conf import UserError
from data_pipelines.chunk_fetcher import ChunkFetcher
from data_pipelines.config import DataConfig, index_path
from data_pipelines.document import Document, Skip, Text
from data_pipelines.headers import DecodeError
from data_pipelines.index import Index
from data_pipelines.inspecting.settings import spread
from data_pipelines.loader import open_indexes
from data_pipelines.order import stable_hash
from data_pipelines.pictures import decode_pictures
from data_pipelines.processes import end_with_parent
from data_pipelines.reader import SourceReader
from data_pipelines.shard_scan import DISAGREEMENT

EXAMPLES = 3
CHUNKS_AHEAD = 4
"""Chunks handed to each worker before its first result is taken."""
RETRY_MINUTES = 0.5
"""A store that does not answer is a finding, not a reason to wait."""
REMEDY = "lint again when its store answers (a run tries for data.retry_minutes)"
DECODED_SIZE = 16
"""Pixels: a picture is decoded to see whether it can be."""
DUPLICATE = "the same key again in this source"


class Example(NamedTuple):
    """name: the sample's webdataset key."""

    shard: str
    name: str


@dataclass
class Findings:
    """What was found in a source, or in a part of it.

    broken: sentences about what stops training or is missing from damaged shards; remarks: about files beside shards
    that count other samples. skips, undecodable: reason -> samples; examples: up to three of each reason. num_decoded:
    samples whose pictures were decoded.
    """

    num_shards: int = 0
    num_samples: int = 0
    num_documents: int = 0
    num_held_out: int = 0
    num_decoded: int = 0
    num_duplicates: int = 0
    broken: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    skips: Counter[str] = field(default_factory=Counter)
    undecodable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, part: Findings) -> None:
        for name in ("num_samples", "num_documents", "num_held_out", "num_decoded"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.broken += [sentence for sentence in part.broken if sentence not in self.broken]
        self.remarks += [sentence for sentence in part.remarks if sentence not in self.remarks]
        self.skips.update(part.skips)
        self.undecodable.update(part.undecodable)
        for reason, examples in part.examples.items():
            for example in examples:
                self.note(reason, example)

    def note(self, reason: str, example: Example) -> None:
        noted = self.examples.setdefault(reason, [])
        if len(noted) < EXAMPLES:
            noted.append(example)


class ChunkFindings(NamedTuple):
    """name_hashes: of the samples in order."""

    findings: Findings
    name_hashes: list[int]


@dataclass(frozen=True)
class Look:
    """What to look at in a source. decode_every: pictures of every so-manyth sample are decoded; 0 = of none."""

    reader: SourceReader
    decode_every: int
    max_pixels: int

    def chunk(self, number: int) -> ChunkFindings:
        """Findings about one chunk. A shard that is missing or changed is a finding."""
        findings, hashes = Findings(), []
        try:
            samples = self.reader.samples(number)
        except UserError as error:
            return ChunkFindings(Findings(broken=[str(error)]), [])
        url = self.reader.index.url(self.reader.index.chunk(number).shard)
        for key, sample in samples:
            hashes.append(stable_hash(sample.name))
            findings.num_samples += 1
            if self.reader.is_held_out(sample):
                findings.num_held_out += 1
            document = self.reader.document(key, 0, sample)
            if isinstance(document, Skip):
                findings.skips[document.reason] += 1
                findings.note(document.reason, Example(url, sample.name))
                continue
            findings.num_documents += 1
            if self.decode_every and hashes[-1] % self.decode_every == 0:
                self._decode(document, findings, Example(url, sample.name))
        return ChunkFindings(findings, hashes)

    def _decode(self, document: Document, findings: Findings, example: Example) -> None:
        pictures = [element for element in document.elements if not isinstance(element, Text)]
        decoded = decode_pictures(pictures, DECODED_SIZE, self.max_pixels)
        findings.num_decoded += bool(pictures)
        for error in [result for result in decoded if isinstance(result, DecodeError)][:1]:
            findings.undecodable[error.reason] += 1
            findings.note(error.reason, example)


def lint_source(name: str, config: DataConfig, max_samples: int | None, max_decoded: int | None) -> Findings:
    """Findings about one source; about so many of its samples are read and decoded, evenly spread, None = all."""
    config = dataclasses.replace(config, retry_minutes=min(config.retry_minutes, RETRY_MINUTES))
    index, broken = open_in_spite(name, config)
    if index is None:
        return Findings(broken=broken)
    damages, remarks = read_defects(index)
    findings = Findings(broken=broken + damages, remarks=remarks, num_shards=index.num_shards)
    chunks = choose_chunks(index, max_samples)
    num_samples = sum(index.chunk(chunk).num_samples for chunk in chunks)
    decode_every = 1 if max_decoded is None else num_samples // max_decoded or 1 if max_decoded else 0
    reader = SourceReader(name, config, index, ChunkFetcher(config, REMEDY))
    look = Look(reader, decode_every, int(config.max_image_megapixels * 1e6))
    hashes: list[np.ndarray] = []
    with tqdm(total=num_samples, desc=f"lint {name}", unit=" samples", disable=None) as bar:
        for part, name_hashes in look_at_all(look, chunks, config.num_workers):
            findings.add(part)
            hashes.append(np.array(name_hashes, np.uint64))
            bar.update(part.num_samples)
    note_duplicates(findings, hashes, chunks, reader)
    if findings.num_samples and not findings.num_documents:
        findings.broken.append(f"no sample of the source {name!r} gives a document: check its kind and options")
    return findings


def open_in_spite(name: str, config: DataConfig) -> tuple[Index | None, list[str]]:
    """The index of a source, and all that is wrong with its shards; None where there is nothing to open."""
    alone = dataclasses.replace(config, sources={name: dataclasses.replace(config.sources[name], weight=1.0)})
    try:
        return open_indexes(alone, build_missing=True)[name], []
    except UserError as error:
        problem = str(error)
    path = index_path(config, name)
    try:
        index = Index(path, json.loads((path / "index.json").read_text()))
    except (OSError, ValueError, KeyError):
        return None, [problem]
    return index, [*changed_shards(index)] or [problem]


def changed_shards(index: Index) -> Iterator[str]:
    for shard in range(index.num_shards):
        try:
            index.check_shard(shard)
        except UserError as error:
            yield str(error)


def read_defects(index: Index) -> tuple[list[str], list[str]]:
    """What is missing from damaged shards, and what files beside shards say otherwise: the tar alone is believed."""
    lines = (index.path / "defects.txt").read_text("utf-8", "surrogateescape").splitlines()
    remarks = [line for line in lines if DISAGREEMENT.search(line)]
    return [line for line in lines if not DISAGREEMENT.search(line)], remarks


def choose_chunks(index: Index, max_samples: int | None) -> Iterable[int]:
    if max_samples is None:
        return range(index.num_chunks)
    return list(spread(index.num_chunks, -(-max_samples * index.num_chunks // index.num_samples)))


def note_duplicates(findings: Findings, hashes: list[np.ndarray], chunks: Iterable[int], reader: SourceReader) -> None:
    """Names that occur twice: downloads of one job have unique keys, so a shard may be there two times.

    hashes: of the names of each chunk.
    """
    together = np.sort(np.concatenate([np.empty(0, np.uint64), *hashes]))
    repeated = together[1:][together[1:] == together[:-1]]
    findings.num_duplicates = len(repeated)
    wanted = repeated[:EXAMPLES]
    for chunk, of_chunk in zip(chunks, hashes, strict=True):
        if len(findings.examples.get(DUPLICATE, ())) < EXAMPLES and np.isin(of_chunk, wanted).any():
            url = reader.index.url(reader.index.chunk(chunk).shard)
            for _, sample in reader.samples(chunk):
                if stable_hash(sample.name) in wanted:
                    findings.note(DUPLICATE, Example(url, sample.name))


def look_at_all(look: Look, chunks: Iterable[int], num_workers: int) -> Iterator[ChunkFindings]:
    """Findings of the chunks in order, by so many processes (0 = this one), few of them waiting."""
    if not num_workers:
        yield from map(look.chunk, chunks)
        return
    with ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(look, os.getpid())) as pool:
        waiting: deque[tuple[int, Future[ChunkFindings]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_look_at, chunk)))
            if len(waiting) > CHUNKS_AHEAD * num_workers:
                yield _result(look, *waiting.popleft())
        while waiting:
            yield _result(look, *waiting.popleft())


def _result(look: Look, number: int, future: Future[ChunkFindings]) -> ChunkFindings:
    try:
        return future.result()
    except BrokenProcessPool as error:
        index = look.reader.index
        chunk = index.chunk(number)
        raise UserError(
            f"a worker died at or near byte {chunk.offset} of the shard {index.url(chunk.shard)}, in a decoder or for "
            "want of memory: look again with data.num_workers=0 to see how"
        ) from error


_look: Look


def _start_worker(look: Look, parent_pid: int) -> None:
    """What is looked at is handed over once, not with every chunk."""
    global _look
    _look = look
    end_with_parent(parent_pid)


def _look_at(chunk: int) -> ChunkFindings:
    return _look.chunk(chunk)
