"""One source of a run: from a place in its index to documents."""

from __future__ import annotations

import tarfile
from collections import Counter, deque
from collections.abc import Iterable

from conf import UserError
from data_pipelines.chunk_fetcher import ChunkFetcher
from data_pipelines.config import DataConfig
from data_pipelines.document import Document, RawSample, SampleKey, Skip
from data_pipelines.index import Index
from data_pipelines.order import SampleRandom, Units, is_held_out
from data_pipelines.retries import UnreachableError
from data_pipelines.sources import make_source
from data_pipelines.stores import is_local
from data_pipelines.tar_samples import parse_samples

KeyedSample = tuple[SampleKey, RawSample]
MAX_UNITS_AHEAD = 8
UNREACHABLE = "unreachable"
MAX_BARREN_EPOCHS, MAX_BARREN_SAMPLES = 20, 100_000
"""So many samples in a row without a document (the fewer of the two) mean that a source is misread. A lane's samples
are as good as random: a single good one among n is missed by n draws with probability 1/e, by 20 n with exp(-20)."""


class SourceReader:
    """Samples and documents of the source `name`, by chunk or by key. Nothing is remembered between calls.

    fetcher: shared with the other sources of a run, where there are any.
    """

    def __init__(self, name: str, config: DataConfig, index: Index, fetcher: ChunkFetcher | None = None) -> None:
        self.name, self.index = name, index
        self.skip_unreachable = config.skip_unreachable
        self._fetcher = fetcher or ChunkFetcher(config)
        self.units = Units(index, name, config.seed, config.lanes)
        self.is_local = all(map(is_local, index.patterns))
        self._random = SampleRandom(config.seed)
        self._holdout = config.sources[name].holdout
        self._max_member_bytes = int(config.max_member_mb * 2**20)
        self._make_document = make_source(name, config.sources[name], config)

    def samples(self, chunk_number: int) -> list[KeyedSample]:
        """All samples of a chunk.

        Raises UnreachableError when it cannot be read, UserError when the shard is not the one that was indexed.
        """
        chunk = self.index.chunk(chunk_number)
        data = self._fetcher.fetch(self.index, chunk)
        try:
            samples = parse_samples(data, self._max_member_bytes)
        except tarfile.TarError:
            samples = []
        if len(samples) != chunk.num_samples:
            self.index.raise_unlike(chunk)
        first = chunk.first_sample
        return [(SampleKey(self.name, chunk.shard, first + i), sample) for i, sample in enumerate(samples)]

    def expect(self, chunk_number: int) -> None:
        """The samples of a chunk will soon be wanted."""
        self._fetcher.expect(self.index, self.index.chunk(chunk_number))

    def is_held_out(self, sample: RawSample) -> bool:
        return is_held_out(self.name, sample.name, self._holdout)

    def document(self, key: SampleKey, epoch: int, sample: RawSample) -> Document | Skip:
        """What becomes of a sample in an epoch: the same whenever it is asked."""
        return self._make_document(sample, self._random.of(epoch, key))

    def held_out(self, chunk_number: int) -> list[tuple[SampleKey, Document]]:
        """The held-out documents of a chunk, as of epoch 0. Raises what `samples` raises."""
        kept = ((key, sample) for key, sample in self.samples(chunk_number) if self.is_held_out(sample))
        made = ((key, self.document(key, 0, sample)) for key, sample in kept)
        return [(key, document) for key, document in made if isinstance(document, Document)]

    def document_of(self, key: SampleKey, epoch: int) -> Document | Skip:
        """`document` of a sample that has to be read again."""
        samples = dict(self.samples(self.index.chunk_of(key.shard, key.index)))
        return self.document(key, epoch, samples[key])


class SourceStream:
    """The training documents of one source in the order in which one lane sees them, from (q, offset) on.

    unreachable: q of the units that are passed over; those join whose store does not answer, with
    `data.skip_unreachable`. skips: reason -> samples passed over so far.
    """

    def __init__(
        self, reader: SourceReader, lanes: int, position: tuple[int, int], unreachable: Iterable[int] = ()
    ) -> None:
        self.reader = reader
        self.unreachable = set(unreachable)
        self.skips: Counter[str] = Counter()
        self._num_taken = 0
        self._lanes = lanes
        self._q, self._offset = position
        self._epoch = 0
        self._samples: deque[KeyedSample] = deque()
        self._num_refused = 0

    @property
    def position(self) -> tuple[int, int]:
        return self._q, self._offset

    def mark(self) -> tuple[tuple[int, int], Counter[str]]:
        """Where the stream stands, for `go_back`."""
        return self.position, Counter(self.skips)

    def go_back(self, mark: tuple[tuple[int, int], Counter[str]]) -> None:
        """What was unreachable since stays so: a second reading of the window must end as this one does."""
        (self._q, self._offset), self.skips = mark
        self._samples.clear()

    def next_document(self) -> tuple[SampleKey, int, Document]:
        """Key, epoch and document of the next sample that has one; raises UserError when there seems to be none."""
        limit = min(MAX_BARREN_EPOCHS * self.reader.index.num_samples, MAX_BARREN_SAMPLES)
        num_before = self.skips.total() - self._num_refused
        while self.skips.total() - num_before < limit:
            if not self._samples:
                self._read_unit()
                continue
            key, sample = self._next_sample()
            held_out = self.reader.is_held_out(sample)
            document = Skip("held out") if held_out else self.reader.document(key, self._epoch, sample)
            if isinstance(document, Document):
                return key, self._epoch, document
            self.skips[document.reason] += 1
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.skips.most_common())
        raise UserError(
            f"the source {self.reader.name!r} gave no document in {limit} samples ({reasons}): "
            f"check kind, options and holdout of data.sources.{self.reader.name}"
        )

    def skip(self, reason: str) -> None:
        """A document was of no use."""
        self.skips[reason] += 1
        self._num_refused += 1

    def accept(self) -> None:
        """A document was of use: the source is not barren."""
        self._num_refused = 0

    def _next_sample(self) -> KeyedSample:
        self._offset += 1
        self._num_taken += 1
        sample = self._samples.popleft()
        if not self._samples:
            self._next_unit()
        return sample

    def _read_unit(self) -> None:
        """The samples of the unit at hand; there may be none, then on to the next."""
        unit = self.reader.units.unit(self._q)
        self._epoch = unit.epoch
        num_left = max(0, unit.last - unit.first - self._offset)
        if num_left and self._q not in self.unreachable:
            try:
                self._samples.extend(self.reader.samples(unit.chunk)[unit.first + self._offset : unit.last])
                return
            except UnreachableError:
                if not self.reader.skip_unreachable:
                    raise
                self.unreachable.add(self._q)
        if num_left:
            self.skips[UNREACHABLE] += num_left
        self._next_unit()

    def _next_unit(self) -> None:
        self._q, self._offset = self._q + self._lanes, 0

    def read_ahead(self, done: float) -> None:
        """Have the units fetched that the rest of a window should need when `done` of it (0 to 1) is filled."""
        if self.reader.is_local:
            return
        wanted = self._num_taken * (1 / done - 1) - len(self._samples)
        first = self._q + (self._lanes if self._samples else 0)
        for q in range(first, first + MAX_UNITS_AHEAD * self._lanes, self._lanes):
            if wanted <= 0:
                return
            unit = self.reader.units.unit(q)
            if q not in self.unreachable:
                self.reader.expect(unit.chunk)
            wanted -= unit.last - unit.first
