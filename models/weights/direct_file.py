"""A file that is written past the page cache, where the file system can do that.

Through the cache every byte is copied into fresh pages, and a training step beside it loses the time that this takes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

BLOCK = 4096
"""Lengths and places that the disk takes without the cache are multiples of this."""
BUFFER = 1 << 23


class DirectFile:
    """A new file, to be written from its beginning to its end within a with-block. Raises OSError."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
            self._is_direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system in memory, or over the network
                raise
            self._descriptor = os.open(path, flags, 0o666)
            self._is_direct = False
        self._memory = memoryview(mmap.mmap(-1, BUFFER))  # begins with a page, as the disk wants it
        self._buffer = np.frombuffer(self._memory, np.uint8)
        self._filled = self._flushed = 0

    def write(self, content: bytes | memoryview) -> None:
        source = np.frombuffer(content, np.uint8)
        while len(source):
            room = self._buffer[self._filled : self._filled + len(source)]
            np.copyto(room, source[: len(room)])
            self._filled += len(room)
            source = source[len(room) :]
            if self._filled == BUFFER:
                self._flush(0, BUFFER)
                self._filled = 0

    def tell(self) -> int:
        return self._flushed + self._filled

    def finish(self) -> None:
        """Write what is left, and wait until all of it is on the disk."""
        blocks = self._filled // BLOCK * BLOCK
        self._flush(0, blocks)
        if self._filled > blocks:
            self._use_cache()
            self._flush(blocks, self._filled)
        self._filled = 0
        os.fsync(self._descriptor)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def _flush(self, begin: int, end: int) -> None:
        while begin < end:
            try:
                written = os.write(self._descriptor, self._memory[begin:end])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._use_cache()  # it wants larger blocks, or has taken a part of one
                continue
            begin += written
            self._flushed += written

    def _use_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._is_direct = False
