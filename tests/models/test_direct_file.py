from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path

import pytest

from models.weights import direct_file
from models.weights.direct_file import BLOCK, BUFFER, DirectFile
from tests.conftest import full_disk

SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER + 3 * BLOCK + 5]


def write(path: Path, content: bytes, parts: int = 5) -> None:
    rng = random.Random(len(content))
    cuts = sorted(rng.randrange(len(content) + 1) for _ in range(parts - 1))
    with DirectFile(path) as file:
        for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            assert file.tell() == begin
            file.write(memoryview(content)[begin:end])
        file.finish()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("supported", [True, False])
def test_what_is_written_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, supported: bool) -> None:
    if not supported:
        refuse_without_cache(monkeypatch)
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(b"of before" * BLOCK)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


def refuse_without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(direct_file.os, "open", refuse)


def test_past_the_cache_go_whole_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every file system refuses the rest."""
    written = os.write
    lengths: list[int] = []

    def note(descriptor: int, content: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            lengths.append(len(content))
        return written(descriptor, content)

    monkeypatch.setattr(direct_file.os, "write", note)
    write(tmp_path / "file", bytes(BUFFER + BLOCK + 77))
    if not lengths:
        pytest.skip(f"{tmp_path} is on a file system without direct writes")
    assert lengths == [BUFFER, BLOCK]


def test_a_disk_that_wants_larger_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no write without the cache."""
    written = os.write
    refused: list[int] = []

    def refuse(descriptor: int, content: memoryview) -> int:
        if not refused:
            refused.append(len(content))
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(descriptor, content)

    monkeypatch.setattr(direct_file.os, "write", refuse)
    content = random.Random(0).randbytes(BUFFER + 77)
    write(tmp_path / "file", content)
    assert refused and (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("limit", [BLOCK, BLOCK + 100, BUFFER + 100])
def test_a_full_disk_is_an_error(tmp_path: Path, limit: int) -> None:
    with full_disk(limit), pytest.raises(OSError, match="File too large"):
        write(tmp_path / "file", bytes(2 * BUFFER))
