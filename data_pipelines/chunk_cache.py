"""Chunks of remote shards kept on a local disk, shared by all processes of a node.

fsspec's caches keep whole files or have no bound, and diskcache pickles and serialises every look-up through one
database. Here an entry is a file, named by the hash of what it holds, with a checksum before its bytes:

    <folder>/ab/abcdef....chunk   entry; its time of last change is that of its last use
    <folder>/locks/abc            held by the process that fetches a chunk whose name begins so
    <folder>/size                 bytes of all entries, roughly; its lock is held by the process that removes old ones
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from conf import UserError

CHECKSUM_BYTES = 32
FULL_AFTER_CLEANING = 0.9


class ChunkCache:
    """At most about `max_bytes` of chunks in `folder`; the least recently used ones make room.

    Raises UserError when the folder cannot be written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            (folder / "size").touch()
        except OSError as error:
            raise UserError(
                f"data.cache_dir={folder} cannot be written ({error.strerror}): choose another folder"
            ) from error

    def get(self, key: tuple[str | int, ...], fetch: Callable[[], bytes]) -> bytes:
        """The bytes of `key`, by `fetch` where they are not here whole. Other processes wait for one that fetches."""
        name = hashlib.sha256(json.dumps(key).encode("ascii")).hexdigest()
        path = self._folder / name[:2] / f"{name}.chunk"
        data = _read_entry(path)
        if data is None:
            with _locked(self._folder / "locks" / name[:3]):
                data = _read_entry(path)
                if data is None:
                    data = fetch()
                    self._put(path, data)
        return data

    def _put(self, path: Path, data: bytes) -> None:
        """A full or failing disk costs the cache, not the run."""
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(_checksum(data) + data)
            temporary.replace(path)
            self._make_room(CHECKSUM_BYTES + len(data))
        except OSError:
            temporary.unlink(missing_ok=True)

    def _make_room(self, num_added: int) -> None:
        with _locked(self._folder / "size") as counter:
            text = counter.read()
            total = int(text) + num_added if text.isdigit() else self._max_bytes + 1  # unknown: count
            if total > self._max_bytes:
                total = self._remove_oldest()
            counter.seek(0)
            counter.truncate()
            counter.write(str(total))

    def _remove_oldest(self) -> int:
        """Bytes left. What killed processes left behind goes with the rest when it is old."""
        found = []
        for path in self._folder.glob("??/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= FULL_AFTER_CLEANING * self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _read_entry(path: Path) -> bytes | None:
    """None where there is no entry, or a damaged one."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    data = content[CHECKSUM_BYTES:]
    return data if content[:CHECKSUM_BYTES] == _checksum(data) else None


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file
