"""Writing tar shards whose bytes depend on nothing but their samples, and which appear only when they are whole."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """One WebDataset sample: members by their whole name in the tar; all begin with the key and a dot."""

    key: str
    members: dict[str, bytes]


def sample_of(key: str, members: dict[str, bytes]) -> Sample:
    """A sample from members by extension."""
    return Sample(key, {f"{key}.{extension}": data for extension, data in members.items()})


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write a shard and return its size in bytes; without any sample there is no shard, and the size is 0.

    Members stand in the order given, without times or owners. (webdataset's TarWriter sorts them, and drops those
    whose extension begins with an underscore.) Raises OSError when the disk does not take it.
    """
    # Always the same name: what a killed run leaves is overwritten. The dot in front hides it from *.tar.
    partial = path.with_name(f".{path.name}.partial")
    num_members = 0
    with partial.open("wb") as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for sample in samples:
                for name, data in sample.members.items():
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = len(data), 0o444
                    tar.addfile(member, io.BytesIO(data))
                    num_members += 1
        _flush_to_disk(stream)
    if not num_members:
        partial.unlink()
        path.unlink(missing_ok=True)
        return 0
    nbytes = partial.stat().st_size
    partial.replace(path)
    return nbytes


def write_whole(path: Path, content: str) -> None:
    """Write a text file that is there whole or not at all. Several tasks may write the same one at the same time."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(content)
        _flush_to_disk(stream)
    partial.replace(path)


def _flush_to_disk(stream: io.IOBase | io.BufferedWriter | io.TextIOWrapper) -> None:
    """Else a power cut may leave a renamed file without its content."""
    stream.flush()
    os.fsync(stream.fileno())
