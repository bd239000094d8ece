"""What validation reads: held-out documents, chosen once and dealt over the data-parallel ranks.

The choice is the same for every number of ranks. It is made when it is first needed, by all ranks together: each reads
every world_size-th chunk.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from data_pipelines.chunk_fetcher import ChunkFetcher
from data_pipelines.document import TokenizedDocument
from data_pipelines.heldout import (
    HeldOutRow,
    is_pair,
    num_enough,
    pack_first,
    read_held_out,
    text_first,
    text_of,
    to_be_continued,
)
from data_pipelines.index import Index
from data_pipelines.lane import LaneSettings, hold_pictures, pictures_of
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from trainer.config import PretrainConfig
from trainer.topology import Topology

log = logging.getLogger(__name__)
MOST_CHUNKS = 4096
"""Of a source, read in search of held-out documents by all ranks together: at data.chunk_mb=4 at most 16 GiB."""
HELD_BYTES = 256 * 2**20
"""Encoded pictures that a rank keeps between validations; the others are read again."""


@dataclass
class Dealt:
    """The rows of this rank out of `total` over the data-parallel ranks."""

    own: list[HeldOutRow] = field(default_factory=list)
    total: int = 0

    def passes(self, num_rows: int, dp_size: int) -> list[list[HeldOutRow]]:
        """Own rows by forward pass, num_rows at most in each: as many passes on every rank, some of them empty."""
        num_passes = math.ceil(math.ceil(self.total / dp_size) / num_rows)
        return [self.own[i * num_rows : (i + 1) * num_rows] for i in range(num_passes)]


@dataclass
class Chosen:
    """rows: packed, for the losses. pairs: text, then its picture. prompts: a picture, then places for its caption.

    shown: on rank 0 the documents of all prompts, by number.
    """

    rows: Dealt = field(default_factory=Dealt)
    pairs: Dealt = field(default_factory=Dealt)
    prompts: Dealt = field(default_factory=Dealt)
    shown: list[TokenizedDocument] = field(default_factory=list)


class HeldOut:
    """indexes: as `open_indexes` gives them, in the order of the source numbers."""

    def __init__(
        self, config: PretrainConfig, indexes: dict[str, Index], tokenizer: Tokenizer, topology: Topology
    ) -> None:
        self.config, self.topology, self.source_names = config, topology, list(indexes)
        self.sources = [name for name in indexes if config.data.sources[name].holdout > 0]
        self.num_queries = config.model.causal_transformer.num_queries
        self._indexes, self._tokenizer = indexes, tokenizer
        self._chosen: Chosen | None = None
        self._settings: LaneSettings | None = None

    @property
    def settings(self) -> LaneSettings:
        if self._settings is None:
            data, topology = self.config.data, self.topology
            fetcher = ChunkFetcher(data)
            readers = [SourceReader(name, data, index, fetcher) for name, index in self._indexes.items()]
            image_size = self.config.model.vision.image_size
            self._settings = LaneSettings(
                data, readers, self._tokenizer, self.num_queries, image_size, 0, topology.tp_rank, topology.tp_size
            )
        return self._settings

    def chosen(self) -> Chosen:
        """Collective when called first. Raises UserError as the loader does."""
        if self._chosen is None:
            self._chosen = self._choose() if self.sources else Chosen()
        return self._chosen

    def truth(self, document: TokenizedDocument) -> str:
        return self._tokenizer.decode(text_of(document, self.num_queries))

    def _choose(self) -> Chosen:
        data, options = self.config.data, self.config.validation
        found = {name: self._search(name) for name in self.sources}
        rows = [row for documents in found.values() for row in pack_first(documents, options.rows, data)]
        by_source = [[d for d in documents if is_pair(d, self.num_queries)] for documents in found.values()]
        pairs = [d for documents in zip_longest(*by_source) for d in documents if d is not None]
        chosen = Chosen(
            self._deal(rows),
            self._deal([[pair] for pair in pairs[: options.retrieval]]),
            self._deal([[pair] for pair in pairs[: options.samples]]),
            pairs[: options.samples] if self.topology.rank == 0 else [],
        )
        self._keep_pictures(chosen)
        chosen.pairs = _each(chosen.pairs, text_first, self._tokenizer, self.num_queries, data.seq_len)
        chosen.prompts = _each(
            chosen.prompts, to_be_continued, self._tokenizer, self.num_queries, options.sample_tokens
        )
        return chosen

    def _search(self, source: str) -> list[TokenizedDocument]:
        """The first held-out documents of a source, enough for validation.rows. Pictures are here of those only that
        this rank has read."""
        config, topology = self.config, self.topology
        reader = next(reader for reader in self.settings.readers if reader.name == source)
        num_chunks = min(reader.index.num_chunks, MOST_CHUNKS)
        documents: list[TokenizedDocument] = []
        free_bytes = HELD_BYTES
        for first in range(0, num_chunks, topology.world_size):
            chunk = first + topology.rank
            own = read_held_out(reader, chunk, self.settings) if chunk < num_chunks else []
            for document in own:
                free_bytes -= hold_pictures(document, free_bytes)
            documents += _of_all_ranks(own, topology)
            enough = num_enough(documents, config.validation.rows, config.data)
            if enough is not None:
                return documents[:enough]
        if not documents and topology.rank == 0:
            log.warning(
                "the source %s has no held-out document in its first %d chunks: it is not validated; raise "
                "data.sources.%s.holdout in a new run", source, num_chunks, source
            )  # fmt: skip
        return documents

    def _deal(self, rows: Sequence[list[TokenizedDocument]]) -> Dealt:
        numbered = [HeldOutRow(number, documents) for number, documents in enumerate(rows)]
        return Dealt(numbered[self.topology.dp_rank :: self.topology.dp_size], len(rows))

    def _keep_pictures(self, chosen: Chosen) -> None:
        """Of what this rank will use, as many as it may hold."""
        dealt = (chosen.rows, chosen.pairs, chosen.prompts)
        used = [document for of_kind in dealt for row in of_kind.own for document in row.documents] + chosen.shown
        with_pictures = {id(document): document for document in used if document.image_starts}
        free_bytes = HELD_BYTES
        for document in with_pictures.values():
            if pictures := pictures_of(document, self.settings):
                document.pictures = list(pictures)
            free_bytes -= hold_pictures(document, free_bytes)


def _of_all_ranks(own: list[TokenizedDocument], topology: Topology) -> list[TokenizedDocument]:
    """What each rank has found, rank after rank; the pictures stay where they are."""
    if topology.world_size == 1:
        return own
    parts: list[Any] = [None] * topology.world_size
    dist.all_gather_object(parts, [dataclasses.replace(document, pictures=None) for document in own])
    parts[topology.rank] = own
    return [document for part in parts for document in part]


def _each(dealt: Dealt, change: Any, *arguments: Any) -> Dealt:
    """With every document changed."""
    changed = [HeldOutRow(row.number, [change(d, *arguments) for d in row.documents]) for row in dealt.own]
    return Dealt(changed, dealt.total)


def longest(rows: Iterable[HeldOutRow], multiple_of: int) -> int:
    """Positions of a batch of rows of one document each; sequence parallelism wants a multiple of its ranks."""
    length = max((len(document.input_ids) for row in rows for document in row.documents), default=2)
    return -(-length // multiple_of) * multiple_of
