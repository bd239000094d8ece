"""The chunks of a run's shards: out of the cache, fetched ahead, or fetched when they are asked for."""

from __future__ import annotations

import os
import queue
import threading
from concurrent.futures import Future
from pathlib import Path

from data_pipelines.chunk_cache import ChunkCache
from data_pipelines.config import DataConfig
from data_pipelines.index import Chunk, Index
from data_pipelines.shards import fetch_range
from data_pipelines.stores import is_local

NUM_THREADS = 8
REMEDY = (
    "start again when its store answers, raise data.retry_minutes, "
    "or pass over such chunks with data.skip_unreachable=true"
)


class ChunkFetcher:
    """Chunks by byte range, shared by the sources of a process. Threads belong to the process that uses it first.

    What is fetched ahead (`expect`) is held until it is asked for, at most `data.prefetch_mb`. remedy: what is advised
    where a store does not answer.
    """

    def __init__(self, config: DataConfig, remedy: str = REMEDY) -> None:
        self._remedy = remedy
        self._retry_minutes = config.retry_minutes
        self._timeout_s = config.request_timeout_s
        self._max_ahead = int(config.prefetch_mb * 2**20)
        self._cache = ChunkCache(Path(config.cache_dir), int(config.cache_gb * 1e9)) if config.cache_dir else None
        self._ahead: _Ahead | None = None

    def fetch(self, index: Index, chunk: Chunk) -> bytes:
        """All bytes of a chunk.

        Raises UnreachableError when its shard is missing or its store does not answer, UserError when the shard is not
        the one that was indexed.
        """
        future = self._ahead_of_this_process().claim(index, chunk)
        if future is not None and future.exception() is None:
            return future.result()
        return self._fetch(index, chunk, self._retry_minutes)

    def expect(self, index: Index, chunk: Chunk) -> None:
        """Begin to fetch a remote chunk that `fetch` will soon be asked for, if there is room for it."""
        if self._max_ahead and not is_local(index.url(chunk.shard)):
            self._ahead_of_this_process().begin(index, chunk)

    def _ahead_of_this_process(self) -> _Ahead:
        if self._ahead is None or self._ahead.pid != os.getpid():
            self._ahead = _Ahead(self, self._max_ahead)
        return self._ahead

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ahead": None}

    def _fetch(self, index: Index, chunk: Chunk, retry_minutes: float) -> bytes:
        url = index.url(chunk.shard)

        def fetch() -> bytes:
            fetched = fetch_range(url, chunk.offset, chunk.nbytes, retry_minutes, self._timeout_s, self._remedy)
            index.check_stat(chunk.shard, fetched.stat)
            if len(fetched.data) != chunk.nbytes:
                index.raise_unlike(chunk)
            return fetched.data

        if self._cache is None or is_local(url):
            return fetch()
        return self._cache.get((url, *index.version(chunk.shard), chunk.offset, chunk.nbytes), fetch)

    def fetch_once(self, index: Index, chunk: Chunk) -> bytes:
        return self._fetch(index, chunk, retry_minutes=0)


class _Ahead:
    """Chunks on their way. A failure is left to whoever asks: it tries again and raises.

    The threads are daemons: a worker that ends must not wait for a slow store.
    """

    def __init__(self, fetcher: ChunkFetcher, max_bytes: int) -> None:
        self.pid = os.getpid()
        self._fetcher = fetcher
        self._free_bytes = max_bytes
        self._futures: dict[tuple[Path, int, int], Future[bytes]] = {}
        self._jobs: queue.SimpleQueue[tuple[Future[bytes], Index, Chunk]] = queue.SimpleQueue()
        self._num_threads = 0

    def begin(self, index: Index, chunk: Chunk) -> None:
        key = (index.path, chunk.shard, chunk.offset)
        if key in self._futures or chunk.nbytes > self._free_bytes:
            return
        self._free_bytes -= chunk.nbytes
        self._futures[key] = Future()
        self._jobs.put((self._futures[key], index, chunk))
        if self._num_threads < min(NUM_THREADS, len(self._futures)):
            threading.Thread(target=self._work, daemon=True).start()
            self._num_threads += 1

    def claim(self, index: Index, chunk: Chunk) -> Future[bytes] | None:
        future = self._futures.pop((index.path, chunk.shard, chunk.offset), None)
        if future is not None:
            self._free_bytes += chunk.nbytes
        return None if future is None or future.cancel() else future  # not begun yet: quicker to fetch it at once

    def _work(self) -> None:
        while True:
            future, index, chunk = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._fetcher.fetch_once(index, chunk))
            except BaseException as error:  # whatever it is, the one who asks must not wait for ever
                future.set_exception(error)
