"""The rows of a data-parallel rank as an endless stream of micro-batches, the same for every split of the work.

Row slot s of a rank is round s // Lr of its lane s % Lr, with Lr = lanes / dp lanes a rank; micro-batch j holds slots
[j B, (j + 1) B). Which worker fills a slot, how many rows a micro-batch has and how many micro-batches a step has
therefore changes no row. No state of a worker is ever saved: every row carries the cursor that follows it.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import itertools
import json
import multiprocessing
import os
import signal
import weakref
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from conf import UserError
from data_pipelines.arena import Arena
from data_pipelines.chunk_fetcher import ChunkFetcher
from data_pipelines.config import DataConfig, index_path, training_sources
from data_pipelines.document import Batch, Cursor, Document, PackedRow, SampleKey
from data_pipelines.index import Index, open_index
from data_pipelines.index_builder import build_index
from data_pipelines.lane import Lane, LaneSettings, first_cursor
from data_pipelines.packing import collate
from data_pipelines.processes import end_with_parent
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer

ORDER_SETTINGS = (
    "seed",
    "lanes",
    "seq_len",
    "max_images_per_row",
    "window_rows",
    "weight_unit",
    "max_image_megapixels",
    "max_member_mb",
    "max_text_characters",
)
SOURCE_SETTINGS = ("kind", "weight", "holdout", "options")

NO_IMAGES = torch.empty(0, dtype=torch.uint8)


class WorkerItem(NamedTuple):
    """(row slot, row) of one worker in a round; their images lie one after the other in a slot of its arena."""

    rows: list[tuple[int, PackedRow]]
    arena_slot: int | None


def run_sources(config: DataConfig, begun: Sequence[str]) -> list[str]:
    """Sources of a run in the order of their numbers: first those that it has begun to read, then what was added.

    Raises UserError when one that was begun is gone: the window that a lane stands in still needs it.
    """
    for name in begun:
        if name not in config.sources:
            raise UserError(
                f"the run has begun to read the source {name!r}, which data.sources no longer has: keep it, with "
                f"data.sources.{name}.weight=0 if it shall not be read any more"
            )
    return [*begun, *(name for name in training_sources(config) if name not in begun)]


def open_indexes(config: DataConfig, build_missing: bool, begun: Sequence[str] = ()) -> dict[str, Index]:
    """Index of each of `run_sources`; one that does not exist yet is built first where `build_missing`."""
    indexes = {}
    for name in run_sources(config, begun):
        source = config.sources[name]
        path = index_path(config, name)
        if build_missing and not path.exists():
            build_index(name, source.shards, path, chunk_samples=config.chunk_samples, chunk_mb=config.chunk_mb)
        indexes[name] = open_index(path)
    return indexes


def fingerprint(
    config: DataConfig, indexes: dict[str, Index], tokenizer: Tokenizer, num_queries: int
) -> dict[str, str]:
    """Everything that the order and content of rows depend on, by name: two runs with equal values see equal rows."""
    parts = {f"data.{name}": str(getattr(config, name)) for name in ORDER_SETTINGS}
    parts["data.sources"] = ", ".join(indexes)
    parts |= {"tokenizer": tokenizer.digest, "model.causal_transformer.num_queries": str(num_queries)}
    for source, index in indexes.items():
        settings = config.sources[source]
        parts |= {
            f"data.sources.{source}.{name}": json.dumps(getattr(settings, name), sort_keys=True)
            for name in SOURCE_SETTINGS
        }
        parts[f"data.sources.{source}.index"] = index.fingerprint
    return parts


def holdout_documents(config: DataConfig, index: Index, source: str) -> Iterator[tuple[SampleKey, Document]]:
    """The held-out documents of a source in the order of its index, as of epoch 0."""
    reader = SourceReader(source, config, index)
    for chunk in range(index.num_chunks):
        yield from reader.held_out(chunk)


class Loader:
    """Endless micro-batches of one data-parallel rank, from `cursors` (lane -> cursor, None = the beginning) on.

    The ranks of a tensor-parallel group get the same rows, each with the pictures that it is to encode.

    indexes: as `open_indexes` gives them. image_size: of the pictures, in pixels. Every iteration starts at `cursors`;
    a batch's own cursors tell how far its consumer has come. unreachable_log: file for what
    `data.skip_unreachable` passes over, a JSON line a unit.
    """

    def __init__(
        self,
        config: DataConfig,
        indexes: dict[str, Index],
        tokenizer: Tokenizer,
        *,
        num_queries: int,
        image_size: int,
        dp_rank: int,
        dp_size: int,
        tp_rank: int = 0,
        tp_size: int = 1,
        cursors: dict[int, Cursor] | None = None,
        unreachable_log: Path | None = None,
    ) -> None:
        self._config, self._tokenizer, self._unreachable_log = config, tokenizer, unreachable_log
        self.source_names = list(indexes)
        num_lanes = config.lanes // dp_size
        lanes = range(dp_rank * num_lanes, (dp_rank + 1) * num_lanes)
        self.cursors = {lane: cursors[lane] if cursors else first_cursor(lane, len(indexes)) for lane in lanes}
        fetcher = ChunkFetcher(config)
        self._readers = [SourceReader(name, config, index, fetcher) for name, index in indexes.items()]
        buffer_bytes = config.buffer_mb * 2**20 // num_lanes
        self._settings = LaneSettings(
            config, self._readers, tokenizer, num_queries, image_size, buffer_bytes, tp_rank, tp_size
        )
        num_batches = -(-max(1, config.num_workers) // config.micro_batch_rows)
        self._round_rows = num_batches * config.micro_batch_rows
        self._prefetch_items = -(-config.prefetch_rows // self._round_rows)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches()
        _running.add(batches)
        return batches

    def _batches(self) -> Generator[Batch, None, None]:
        """Round by round: the fewest micro-batches that give every worker something to do."""
        arenas = [self._make_arena() for _ in range(self._config.num_workers)] or [None]
        items = iter(self._open_workers(arenas))
        tp_rank = self._settings.tp_rank
        try:
            while True:
                slots = dict(
                    itertools.chain.from_iterable(_rows_of(_next_item(items), arena, tp_rank) for arena in arenas)
                )
                while slots:
                    rows = [slots.pop(slot) for slot in sorted(slots)[: self._config.micro_batch_rows]]
                    self._log_unreachable(rows)
                    yield collate(rows, self._config.seq_len, self._tokenizer.pad, self.source_names)
        finally:
            del items  # ends the workers, even where a traceback keeps this frame

    def _log_unreachable(self, rows: list[PackedRow]) -> None:
        """Written as whole lines to the end of the file, which all ranks share."""
        units = [(row.lane, self._readers[source], q) for row in rows for source, q in row.unreachable]
        if units and self._unreachable_log is not None:
            with self._unreachable_log.open("a") as file:
                file.write("".join(json.dumps(_told(lane, reader, q)) + "\n" for lane, reader, q in units))

    def _make_arena(self) -> Arena | None:
        return Arena(
            num_in_flight=self._prefetch_items,
            num_images=self._round_rows * -(-self._config.max_images_per_row // self._settings.tp_size),
            image_size=self._settings.image_size,
        )

    def _open_workers(self, arenas: list[Arena | None]) -> DataLoader:
        """Batches come round-robin: item j of every worker, in worker order, before item j + 1 of any."""
        own = torch.Generator()  # else every start would draw from the process's, and a resumed run's dropout differ
        rows = _LaneRows(self._settings, self.cursors, self._round_rows, arenas)
        if not self._config.num_workers:
            return DataLoader(rows, batch_size=None, collate_fn=_as_it_is, generator=own)
        return DataLoader(
            rows,
            batch_size=None,
            collate_fn=_as_it_is,
            generator=own,
            num_workers=self._config.num_workers,
            prefetch_factor=self._prefetch_items,
            multiprocessing_context="fork",  # shares the arenas
            worker_init_fn=functools.partial(_outlive_signals, os.getpid()),
        )


def _told(lane: int, reader: SourceReader, q: int) -> dict[str, str | int]:
    """Where the samples lie that a lane passed over with unit q."""
    unit = reader.units.unit(q)
    chunk = reader.index.chunk(unit.chunk)
    return {
        "source": reader.name,
        "shard": reader.index.url(chunk.shard),
        "first_sample": chunk.first_sample + unit.first,
        "num_samples": unit.last - unit.first,
        "epoch": unit.epoch,
        "lane": lane,
        "q": q,
    }


class _LaneRows(IterableDataset):
    """Item j of worker w of W: the rows of round j that come from its lanes, every W-th of the rank's."""

    def __init__(
        self, settings: LaneSettings, cursors: dict[int, Cursor], round_rows: int, arenas: Sequence[Arena | None]
    ) -> None:
        self._settings, self._cursors, self._num_rows, self._arenas = settings, cursors, round_rows, arenas

    def __iter__(self) -> Iterator[WorkerItem | UserError]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        lanes = {
            position: Lane(lane, self._settings, self._cursors[lane])
            for position, lane in enumerate(sorted(self._cursors))
            if position % step == first
        }
        for lane_rows in lanes.values():
            lane_rows.expect_window()
        try:
            for j in itertools.count():
                slots = range(j * self._num_rows, (j + 1) * self._num_rows)
                wanted = [(slot, slot % len(self._cursors)) for slot in slots]
                own = [(slot, lanes[position]) for slot, position in wanted if position in lanes]
                yield _worker_item(own, self._arenas[worker.id if worker else 0])
        except UserError as error:  # raised in a worker, it would reach the user wrapped in a traceback
            yield error


def _worker_item(lanes: list[tuple[int, Lane]], arena: Arena | None) -> WorkerItem:
    """The next row of each of the lanes, which come with their row slots."""
    if arena is None:
        return WorkerItem([(slot, lane.next_row()) for slot, lane in lanes], None)
    rows = []
    arena_slot, images = arena.take()
    for slot, lane in lanes:
        row = lane.next_row(images)
        images = images[len(row.images) :]
        rows.append((slot, dataclasses.replace(row, images=NO_IMAGES)))
    return WorkerItem(rows, arena_slot)


def _next_item(items: Iterator[WorkerItem | UserError]) -> WorkerItem | UserError:
    try:
        return next(items)
    except Exception as error:
        del items  # it, or a traceback through it, would keep the workers, for which the exit would wait for ever
        raise error.with_traceback(None) from None


def _rows_of(item: WorkerItem | UserError, arena: Arena | None, tp_rank: int) -> list[tuple[int, PackedRow]]:
    """The rows with this rank's images."""
    if isinstance(item, UserError):
        raise item
    if arena is None or item.arena_slot is None:
        return item.rows
    counts = [row.image_counts[tp_rank] for _, row in item.rows]
    images = arena.lend(item.arena_slot, sum(counts)).split(counts)
    return [(slot, dataclasses.replace(row, images=own)) for (slot, row), own in zip(item.rows, images, strict=True)]


def _as_it_is(item: Any) -> Any:
    return item


_running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """Before multiprocessing's own clean-up, which waits for ever for a worker that a dead store holds: its SIGTERM is
    ignored."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for the ones that are killed here
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    for batches in list(_running):
        batches.close()


def _outlive_signals(rank_pid: int, _: int) -> None:
    """Workers serve the last micro-batches before a stop that a signal asked for, and die with their rank.

    What the rank has not yet collected is not theirs to collect: objects with threads would wait for them for ever.
    """
    gc.freeze()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(rank_pid)
