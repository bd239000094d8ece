"""Shards: finding them and reading byte ranges of them, wherever fsspec reaches."""

from __future__ import annotations

import os
from collections.abc import Callable
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from braceexpand import braceexpand

from conf import UserError


class ShardStat(NamedTuple):
    """Size in bytes; mtime_ns is 0 where the storage tells none."""

    size: int
    mtime_ns: int


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
    return _remote(pattern, _glob) if has_magic(pattern) else [pattern]


def _glob(fs: Any, pattern: str) -> list[str]:
    return [local_path(fs.unstrip_protocol(found)) for found in fs.glob(pattern)]


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    return url.removeprefix("file://")


def stat_shard(url: str) -> ShardStat:
    """Raises UserError naming the shard when it is missing."""
    try:
        if is_local(url):
            stat = Path(local_path(url)).stat()
            return ShardStat(stat.st_size, stat.st_mtime_ns)
        return ShardStat(_remote(url, lambda fs, path: int(fs.info(path)["size"])), 0)
    except OSError as error:
        raise _unreadable(url, error) from error


def read_range(url: str, offset: int, nbytes: int) -> bytes:
    """Exactly `nbytes` bytes of a shard from `offset` on, in one contiguous read."""
    try:
        if is_local(url):
            with Path(local_path(url)).open("rb", buffering=0) as shard:
                data = os.pread(shard.fileno(), nbytes, offset)
        else:
            data = _remote(url, lambda fs, path: fs.cat_file(path, start=offset, end=offset + nbytes))
    except OSError as error:
        raise _unreadable(url, error) from error
    if len(data) != nbytes:
        raise UserError(f"the shard {url} ends before byte {offset + nbytes}: restore it, or build its index again")
    return data


def open_shard(url: str) -> BinaryIO:
    """A seekable stream of the whole shard."""
    try:
        if is_local(url):
            return Path(local_path(url)).open("rb")
        return _remote(url, lambda fs, path: fs.open(path, "rb"))
    except OSError as error:
        raise _unreadable(url, error) from error


def _remote(url: str, call: Callable[[Any, str], Any]) -> Any:
    """The one place where fsspec is called."""
    try:
        return call(*fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be reached: {str(error).splitlines()[0]}") from error


def _unreadable(url: str, error: OSError) -> UserError:
    return UserError(
        f"the shard {url} cannot be read ({error.strerror or error}): restore it, or change the shard pattern"
    )
