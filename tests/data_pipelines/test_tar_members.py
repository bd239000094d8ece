"""Members read fast are those that webdataset reads; what is not plain is left to it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter
from webdataset.tariterators import tar_file_iterator

from data_pipelines import tar_members
from data_pipelines.tar_members import read_members


def slowly(data: bytes) -> list[tuple[str, bytes]]:
    return [(member["fname"], member["data"]) for member in tar_file_iterator(io.BytesIO(data))]


def outcome(read: object, data: bytes) -> object:
    try:
        return list(read(data))  # type: ignore[operator]
    except tarfile.TarError:
        return "damaged"


def make_tar(infos: list[tarfile.TarInfo], format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
        end = tar.offset
    return stream.getvalue()[:end]


def member(name: str, size: int = 10, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


@pytest.fixture
def tarfile_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("read by tarfile")

    monkeypatch.setattr(tar_members, "tar_file_iterator", refuse)


@pytest.mark.usefixtures("tarfile_is_forbidden")
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_tars_are_read_fast(format: int) -> None:
    data = make_tar([member("a.jpg", 700), member("a.txt", 0), member("__meta__"), member("dir/b.0.jpg", 512)], format)
    expected = [("a.jpg", b"x" * 700), ("a.txt", b""), ("dir/b.0.jpg", b"x" * 512)]
    assert list(read_members(data)) == expected
    assert slowly(data) == expected


@pytest.mark.usefixtures("tarfile_is_forbidden")
def test_webdatasets_own_tars_are_read_fast(tmp_path: Path) -> None:
    """Its writer puts the time before every member."""
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "7", "txt": "a dog", "jpg": b"12"})
    data = (tmp_path / "0.tar").read_bytes()
    assert b"mtime=" in data
    end = data.rindex(b"a dog") + tar_members.BLOCK
    assert list(read_members(data[:end])) == [("7.jpg", b"12"), ("7.txt", b"a dog")]


def test_what_is_not_plain_is_read_all_the_same() -> None:
    for infos in (
        [member("a.jpg"), member("x" * 150 + ".jpg"), member("b.txt")],
        [member("é.jpg")],
        [member("a" * 60 + "/" + "b" * 60 + ".jpg")],
        [member("a.jpg"), member("link.jpg", 0, tarfile.SYMTYPE), member("folder", 0, tarfile.DIRTYPE)],
        [member("old.jpg", 3, tarfile.AREGTYPE)],
    ):
        for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            try:
                data = make_tar(infos, format)
            except ValueError:  # a name too long for ustar
                continue
            assert list(read_members(data)) == slowly(data)
            assert list(read_members(data + bytes(1024))) == slowly(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 6 * 512 - 1), st.integers(0, 255), st.booleans())
def test_a_changed_byte_changes_nothing_else(position: int, value: int, pax: bool) -> None:
    infos = [member("a.jpg", 30), member("a.txt", 3), member("b.jpg", 600)]
    for info in infos:
        info.mtime = 1.5 if pax else 1  # type: ignore[assignment]
    data = bytearray(make_tar(infos, tarfile.PAX_FORMAT))
    data[position] = value
    assert outcome(read_members, bytes(data)) == outcome(slowly, bytes(data))


@given(st.binary(max_size=2048))
def test_noise_is_not_taken_for_a_tar(noise: bytes) -> None:
    assert outcome(read_members, noise) == outcome(slowly, noise)
