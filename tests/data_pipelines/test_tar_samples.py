from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipelines.document import RawSample
from data_pipelines.tar_samples import parse_samples, scan_samples

LIMIT = 1 << 20
Member = tuple[str, bytes, bytes]


def make_tar(members: list[Member], format: int = tarfile.GNU_FORMAT) -> bytes:
    """members: name, type, data."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data)
            info.linkname = "elsewhere" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def scan(data: bytes) -> tuple[list[tuple[int, int]], list[str]]:
    found = scan_samples(io.BytesIO(data), len(data))
    return found.ranges, found.defects


def parse_by_webdataset(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    """webdataset's own stages; on a duplicate member they keep the first and go on."""
    files = tar_file_expander([{"url": "x", "stream": io.BytesIO(data)}])
    samples = group_by_keys(files, handler=lambda error: True)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]


NAMES = st.one_of(
    st.sampled_from(
        ["a.jpg", "a.txt", "a.JPG", "b.jpg", "b.0.txt", "dir/a.jpg", "../../x.jpg", "noext", "__meta__.json"]
    ),
    st.sampled_from(["x" * 90 + ".jpg", "y/" * 80 + "a.txt", "é.jpg", "a b.jpg", ".hidden", "a."]),
)
KINDS = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE])
MEMBERS = st.lists(st.tuples(NAMES, KINDS, st.binary(max_size=1200)), min_size=1, max_size=14)
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def regular_only(members: list[Member]) -> list[Member]:
    return [(name, kind, data if kind == tarfile.REGTYPE else b"") for name, kind, data in members]


@settings(max_examples=150, deadline=None)
@given(MEMBERS, FORMATS)
def test_samples_equal_webdataset_and_slices_equal_the_whole(members: list[Member], format: int) -> None:
    data = make_tar(regular_only(members), format)
    ranges, defects = scan(data)
    whole = parse_samples(data, LIMIT)
    assert defects == []
    expected = parse_by_webdataset(data)
    assert [s.name for s in whole] == [name for name, _ in expected]
    for sample, (_, parts) in zip(whole, expected, strict=True):
        assert set(sample.members) == set(parts)
        assert sample.defect or sample.members == parts
    assert [parse_samples(data[start:end], LIMIT) for start, end in ranges] == [[sample] for sample in whole]
    if ranges:
        assert parse_samples(data[ranges[0][0] : ranges[-1][1]], LIMIT) == whole


@settings(max_examples=60, deadline=None)
@given(MEMBERS, st.integers(0, 20_000), FORMATS)
def test_a_cut_tar_gives_a_prefix_and_a_defect(members: list[Member], cut: int, format: int) -> None:
    data = make_tar(regular_only(members), format)
    whole = parse_samples(data, LIMIT)
    ranges, defects = scan(data[:cut])
    found = [parse_samples(data[start:end], LIMIT)[0] for start, end in ranges]
    assert all(end <= cut for _, end in ranges)
    assert found[:-1] == whole[: max(0, len(found) - 1)]
    if found and found[-1] != whole[len(found) - 1]:  # cut between two members: nothing tells that more was to come
        assert found[-1].members.keys() <= whole[len(found) - 1].members.keys()  # contents differ in duplicates
        assert not defects
    assert len(found) == len(whole) or defects or cut % 512 == 0


def test_duplicates_and_large_members_are_defects() -> None:
    regular = tarfile.REGTYPE
    data = make_tar(
        [("a.jpg", regular, b"1"), ("a.jpg", regular, b"2"), ("b.txt", regular, b"12345"), ("b.cls", regular, b"1")]
    )
    assert parse_samples(data, 4) == [
        RawSample("a", {"jpg": b"2"}, "duplicate member"),
        RawSample("b", {"txt": b"", "cls": b"1"}, "member too large"),
    ]


def test_a_damaged_header_is_no_end_of_archive() -> None:
    regular = tarfile.REGTYPE
    data = bytearray(make_tar([(f"{i}.txt", regular, b"x" * 10) for i in range(4)]))
    data[2 * 1024 + 3] ^= 0xFF
    ranges, defects = scan(bytes(data))
    assert ranges == [(0, 1024)]  # the damaged member might belong to the sample before it
    assert defects == ["damaged header at byte 2048: the rest is left out"]


def test_what_is_behind_the_end_of_the_archive_is_a_defect() -> None:
    """Two archives, one appended to the other: readers stop at the first end."""
    first, second = (make_tar([(f"{i}.txt", tarfile.REGTYPE, b"x" * 10)]) for i in range(2))
    ranges, defects = scan(first + second)
    assert ranges == [(0, 1024)]
    assert defects == ["data behind the end of the archive at byte 1024: they are left out"]
    assert scan(first + bytes(100_000)) == ([(0, 1024)], [])


def test_a_sparse_member_takes_only_its_sample_along() -> None:
    data = bytearray(make_tar([(f"{i}.txt", tarfile.REGTYPE, b"x" * 10) for i in range(3)]))
    header = tarfile.TarInfo("1.txt")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 10
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 10)
    block[483:495] = b"%011o\0" % (1 << 32)  # four terabytes of zeros would be read
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    data[1024:1536] = block
    ranges, defects = scan(bytes(data))
    assert ranges == [(0, 1024), (2048, 3072)]
    assert len(defects) == 1 and "sparse" in defects[0]


@pytest.mark.parametrize(
    ("data", "defect"), [(b"", "no tar"), (b"\x1f\x8b" + b"x" * 600, "gzip"), (b"text" * 300, "no tar")]
)
def test_what_is_no_tar(data: bytes, defect: str) -> None:
    ranges, defects = scan(data)
    assert ranges == [] and defect in defects[0]


def test_real_broken_shards(real_data: Path) -> None:
    expected = json.loads((real_data / "corrupt" / "expected.json").read_text())
    for shard, facts in expected.items():
        data = (real_data / "corrupt" / shard).read_bytes()
        ranges, defects = scan(data)
        names = [parse_samples(data[start:end], 1 << 28)[0].name for start, end in ranges]
        assert set(facts["good_keys"]) <= set(names)
        assert len(names) == facts["samples"] + {"truncated_tar.tar": -1, "path_traversal.tar": 1}.get(shard, 0)
        assert bool(defects) == (shard == "truncated_tar.tar")
