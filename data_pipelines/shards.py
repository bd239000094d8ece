"""Shards: finding them and reading byte ranges of them, wherever fsspec reaches."""

from __future__ import annotations

import io
import os
import re
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from braceexpand import braceexpand

from conf import UserError
from data_pipelines import stores
from data_pipelines.retries import REMEDY, with_retries
from data_pipelines.stores import Fetched, ShardStat, is_local, local_path

RETRY_MINUTES = 1.0
BLOCK_BYTES = 1 << 20


def expand_shards(pattern: str) -> list[str]:
    """Urls (absolute paths where local) of a path, glob or brace pattern, sorted.

    Raises UserError when nothing matches, and for webdataset's ``pipe:`` urls.
    """
    try:
        patterns = [pattern] if Path(pattern).exists() else list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"the shard pattern {pattern!r} has unbalanced braces: close them") from error
    urls = {url for single in patterns for url in _expand_glob(single)}
    if not urls:
        raise UserError(f"no shard matches {pattern!r}: check the path")
    return sorted(urls)


def _expand_glob(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        raise UserError(
            f"the shards {pattern!r} are a shell command, which serves no byte ranges: "
            "name files, or urls that fsspec can read"
        )
    path = Path(local_path(pattern))
    if is_local(pattern) and path.is_dir():
        raise UserError(f"the shards {pattern!r} are a folder: name its tars, as in {path / '*.tar'}")
    if is_local(pattern) and (path.exists() or not has_magic(pattern)):
        return [str(path.absolute())]
    is_pattern = re.search(r"[*\[]", pattern) if pattern.startswith("http") else has_magic(pattern)
    return _glob(pattern) if is_pattern else [pattern]  # in a web address a question mark begins the query


def _glob(pattern: str) -> list[str]:
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        return [local_path(fs.unstrip_protocol(found)) for found in fs.glob(path)]
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{pattern} cannot be listed ({str(error).splitlines()[0]}): name its shards") from error


def stat_shard(url: str, retry_minutes: float = RETRY_MINUTES) -> ShardStat:
    """Raises UnreachableError, a UserError, naming the shard when it is missing or its store does not answer."""
    return with_retries(lambda: stores.stat(url), url, retry_minutes)


def fetch_range(
    url: str,
    offset: int,
    nbytes: int,
    retry_minutes: float = RETRY_MINUTES,
    timeout_s: float = stores.REQUEST_TIMEOUT_S,
    remedy: str = REMEDY,
) -> Fetched:
    """At most `nbytes` bytes of a shard from `offset` on, fewer where it ends, and the version that they are of.

    Raises UnreachableError when the shard is missing, or its store gave no whole answer in `retry_minutes`; it then
    advises `remedy`.
    """
    return with_retries(lambda: stores.read(url, offset, nbytes, timeout_s), url, retry_minutes, remedy)


def read_range(url: str, offset: int, nbytes: int) -> bytes:
    """Exactly `nbytes` bytes of a shard from `offset` on. Raises UserError when it ends before."""
    data = fetch_range(url, offset, nbytes).data if nbytes else b""
    if len(data) != nbytes:
        raise UserError(f"the shard {url} ends before byte {offset + nbytes}: restore it, or build its index again")
    return data


def open_shard(url: str) -> BinaryIO:
    """A seekable stream of the whole shard. Raises UnreachableError, also while it is read."""
    size = stat_shard(url).size
    if is_local(url):
        return Path(local_path(url)).open("rb")
    return io.BufferedReader(_RangeStream(url, size), BLOCK_BYTES)


class _RangeStream(io.RawIOBase):
    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        nbytes = max(0, min(len(buffer), self._size - self._position))
        buffer[:nbytes] = read_range(self._url, self._position, nbytes)
        self._position += nbytes
        return nbytes
