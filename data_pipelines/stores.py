"""Where shards lie: one read, without a second try, of a local file, http(s)://, s3:// or whatever fsspec reaches.

Every read tells which version of the shard it saw: a replaced one is noticed without a further request.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

REQUEST_TIMEOUT_S = 60.0
TIMED_BYTES = 4 << 20
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)


class ShardStat(NamedTuple):
    """Size in bytes; mtime_ns is 0 and etag is "" where the storage tells none. Equal for the same version."""

    size: int
    mtime_ns: int
    etag: str = ""


class Fetched(NamedTuple):
    """Bytes of a shard, fewer than asked for only at its end, and the version of it that they are of."""

    data: bytes
    stat: ShardStat


class TransientError(Exception):
    """A failure that may pass: a connection lost, an overloaded server, an answer that is cut short."""


class PermanentError(Exception):
    """A failure that no second try mends: a missing shard, no permission, an unknown protocol."""


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    return url.removeprefix("file://")


def read(url: str, offset: int, nbytes: int, timeout_s: float = REQUEST_TIMEOUT_S) -> Fetched:
    """Bytes [offset, offset + nbytes), nbytes > 0. timeout_s: for each 4 MiB of them.

    Raises TransientError or PermanentError.
    """
    timeout_s *= max(1.0, nbytes / TIMED_BYTES)
    protocol = url.partition("://")[0]
    if is_local(url):
        return _read_local(local_path(url), offset, nbytes)
    if protocol in ("http", "https"):
        from data_pipelines.http_store import read_http

        return read_http(url, offset, nbytes, timeout_s)
    return _explained(_read_s3 if protocol in ("s3", "s3a") else _read_other, url, offset, nbytes, timeout_s)


def stat(url: str, timeout_s: float = REQUEST_TIMEOUT_S) -> ShardStat:
    """Raises TransientError or PermanentError."""
    if is_local(url):
        try:
            return _stat_of(Path(local_path(url)).stat())
        except OSError as error:
            raise _told_apart(error) from error
    return read(url, 0, 1, timeout_s).stat


def _read_local(path: str, offset: int, nbytes: int) -> Fetched:
    try:
        with Path(path).open("rb", buffering=0) as shard:
            return Fetched(os.pread(shard.fileno(), nbytes, offset), _stat_of(os.fstat(shard.fileno())))
    except OSError as error:
        raise _told_apart(error) from error


def _stat_of(found: os.stat_result) -> ShardStat:
    return ShardStat(found.st_size, found.st_mtime_ns)


def _read_s3(url: str, offset: int, nbytes: int, timeout_s: float) -> Fetched:
    from data_pipelines.s3_store import read_s3  # an extra, which other stores do not need

    return read_s3(url, offset, nbytes, timeout_s)


def _read_other(url: str, offset: int, nbytes: int, timeout_s: float) -> Fetched:
    """The version is looked up after the read: one that was replaced before or between is noticed."""
    fs, path = fsspec.core.url_to_fs(url)
    data = fs.cat_file(path, start=offset, end=offset + nbytes)
    fs.invalidate_cache(fs._parent(path))
    info = fs.info(path)
    etag = next((str(info[name]) for name in ("etag", "ETag", "generation") if info.get(name)), "")
    return Fetched(data, ShardStat(int(info["size"]), 0, etag))


def _explained(call: Callable[..., Fetched], url: str, *arguments: Any) -> Fetched:
    """Every filesystem has errors of its own: what is not surely permanent gets its second try."""
    try:
        return call(url, *arguments)
    except (TransientError, PermanentError):
        raise
    except Exception as error:
        raise _told_apart(error) from error


def _told_apart(error: Exception) -> TransientError | PermanentError:
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return PermanentError(text) if isinstance(error, PERMANENT) else TransientError(text)
