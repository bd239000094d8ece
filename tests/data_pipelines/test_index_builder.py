from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from conf import UserError
from data_pipelines import index_builder, shard_scan
from data_pipelines.index import Index, open_index
from data_pipelines.index_builder import build_index, scan_share
from data_pipelines.index_parts import Parts
from data_pipelines.index_writer import names_within
from data_pipelines.shard_scan import REMOTE_BLOCK_BYTES, scan_shard
from data_pipelines.stores import Fetched
from tests.data_pipelines.corpora import write_tar, write_texts

SETTINGS = {"chunk_samples": 4, "chunk_mb": 0.02}


def write_corpus(folder: Path, num_shards: int = 9) -> str:
    """Texts of several members, one shard empty, one cut off, one large sample."""
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        samples = [
            {"__key__": f"{shard}-{i}", "json": {"i": i}, "bin": bytes(37 * (i + shard) ** 2 % 6000), "txt": f"{i}"}
            for i in range(3 * shard)
        ]
        write_tar(folder / f"{shard:03d}.tar", samples)
    write_tar(folder / "large.tar", [{"__key__": str(i), "bin": bytes(30_000 * (i == 1) + 5)} for i in range(4)])
    whole = (folder / "004.tar").read_bytes()
    (folder / "004.tar").write_bytes(whole[: len(whole) // 2])
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    return f"{folder}/*.tar"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples_by_tarfile(path: str) -> list[tuple[int, int]]:
    """Byte ranges of the samples of a whole tar, from Python's own reader."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    ends = [member.offset_data + -(-member.size // 512) * 512 for member in members]
    ranges: dict[str, tuple[int, int]] = {}
    for member, end in zip(members, ends, strict=True):
        key = member.name.split(".")[0]
        ranges[key] = (ranges.get(key, (member.offset, 0))[0], end)
    return list(ranges.values())


def ranges_of(index: Index, shard: int) -> list[tuple[int, int, int]]:
    """First byte, end and number of samples of a shard's chunks."""
    chunks = [index.chunk(number) for number in range(index.num_chunks)]
    return [(c.offset, c.offset + c.nbytes, c.num_samples) for c in chunks if c.shard == shard]


def test_chunks_stand_where_pythons_tarfile_finds_the_samples(tmp_path: Path) -> None:
    index = build_index("x", write_corpus(tmp_path / "corpus"), tmp_path / "index", **SETTINGS)
    assert index.num_shards == 10 and index.num_defects == 1
    for shard in set(range(10)) - {4}:
        samples = samples_by_tarfile(index.url(shard))
        first = 0
        for start, end, count in ranges_of(index, shard):
            assert (start, end) == (samples[first][0], samples[first + count - 1][1])
            assert count <= 4 and (end - start <= 0.02 * 2**20 or count == 1)
            first += count
        assert first == len(samples)


def test_the_fingerprint_is_that_of_names_sizes_and_chunks(tmp_path: Path) -> None:
    index = build_index("x", write_corpus(tmp_path / "corpus"), tmp_path / "index", **SETTINGS)
    paths = sorted((tmp_path / "corpus").iterdir())
    digest = hashlib.sha256(json.dumps([[p.name for p in paths], [p.stat().st_size for p in paths]]).encode())
    for number in range(index.num_chunks):
        digest.update(struct.pack("<5q", *index.chunk(number)))
    assert index.fingerprint == digest.hexdigest()


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["/a/b/0.tar"], ["0.tar"]),
        (["/a/b/0.tar", "/a/bc/0.tar"], ["b/0.tar", "bc/0.tar"]),
        (["/a/0/x.tar", "/a/1.tar"], ["0/x.tar", "1.tar"]),
        (["https://h/a/0.tar", "https://h/a/b/0.tar"], ["0.tar", "b/0.tar"]),
        (["/a/0.tar", "s3://a/0.tar"], ["/a/0.tar", "s3://a/0.tar"]),
    ],
)
def test_names_do_not_tell_where_the_corpus_is(urls: list[str], names: list[str]) -> None:
    assert names_within(urls) == names


def by_workers(pattern: str, out: Path) -> None:
    build_index("x", pattern, out, workers=3, **SETTINGS)


def by_tasks(pattern: str, out: Path) -> None:
    for task in (2, 0, 3, 1):
        scan_share("x", pattern, out, task, 4, **SETTINGS)
    assert not out.exists()
    build_index("x", pattern, out, **SETTINGS)


def by_tasks_of_which_one_is_lost(pattern: str, out: Path) -> None:
    for task in (0, 2, 3):
        scan_share("x", pattern, out, task, 4, workers=2, **SETTINGS)
    build_index("x", pattern, out, **SETTINGS)


def stopped_within_a_record(pattern: str, out: Path) -> None:
    scan_share("x", pattern, out, 0, 2, **SETTINGS)
    (part,) = out.with_name(f"{out.name}.parts").glob("*.part")
    part.write_bytes(part.read_bytes()[:-7])
    report = scan_share("x", pattern, out, 0, 2, **SETTINGS)
    assert (report.num_scanned, report.num_earlier) == (1, 4)
    build_index("x", pattern, out, **SETTINGS)


def with_zeros_after_a_crash(pattern: str, out: Path) -> None:
    scan_share("x", pattern, out, 0, 1, **SETTINGS)
    (part,) = out.with_name(f"{out.name}.parts").glob("*.part")
    part.write_bytes(part.read_bytes()[:200] + bytes(5000))
    build_index("x", pattern, out, **SETTINGS)


def twice(pattern: str, out: Path) -> None:
    build_index("x", pattern, out, chunk_samples=2)
    build_index("x", pattern, out, **SETTINGS)


@pytest.mark.parametrize(
    "build",
    [by_workers, by_tasks, by_tasks_of_which_one_is_lost, stopped_within_a_record, with_zeros_after_a_crash, twice],
)
def test_the_index_is_the_same_however_it_was_built(tmp_path: Path, build: Callable[[str, Path], None]) -> None:
    pattern = write_corpus(tmp_path / "corpus")
    build_index("x", pattern, tmp_path / "expected", **SETTINGS)
    build(pattern, tmp_path / "index")
    assert files_of(tmp_path / "index") == files_of(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "expected", "index"]


def test_what_was_scanned_is_not_scanned_again_unless_it_changed(tmp_path: Path) -> None:
    for i in range(4):
        write_texts(tmp_path / f"{i}.tar", 10 * i, 5)
    scan_share("x", f"{tmp_path}/*.tar", tmp_path / "index", 0, 1)
    stat = (tmp_path / "0.tar").stat()
    (tmp_path / "0.tar").write_bytes(bytes(stat.st_size))
    os.utime(tmp_path / "0.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # nobody can see that it changed
    write_texts(tmp_path / "1.tar", 0, 7)
    write_texts(tmp_path / "4.tar", 0, 1)
    report = scan_share("x", f"{tmp_path}/*.tar", tmp_path / "index", 0, 1)
    assert (report.num_scanned, report.num_earlier) == (2, 3)
    index = build_index("x", f"{tmp_path}/*.tar", tmp_path / "index")
    assert [index.chunk(i).num_samples for i in range(5)] == [5, 7, 5, 5, 1]


def test_parts_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    pattern = str(write_texts(tmp_path / "0.tar", 0, 9))
    scan_share("x", pattern, tmp_path / "index", 0, 1, chunk_samples=3)
    with pytest.raises(UserError, match=r"index\.parts holds a build that was begun with .*'chunk_samples': 3"):
        build_index("x", pattern, tmp_path / "index", chunk_samples=4)


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_out_of_reach_are_told_and_tried_again(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_texts(tmp_path / "0.tar", 0, 5)
    write_texts(tmp_path / "2.tar", 0, 5)
    pattern = f"{tmp_path}/{{0..3}}.tar"
    with pytest.raises(UserError, match=r"2 of 4 shards could not be scanned, .*run the same command again"):
        build_index("x", pattern, tmp_path / "index", workers=workers)
    assert sum("not scanned" in message for message in caplog.messages) == 2
    assert not (tmp_path / "index").exists()
    for i in (1, 3):
        write_texts(tmp_path / f"{i}.tar", 0, 2)
    assert build_index("x", pattern, tmp_path / "index", workers=workers).num_samples == 14


def test_a_storage_out_of_reach_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_builder, "MAX_FAILED_SHARDS", 5)
    tried: list[str] = []

    def fail(url: str, *_: int, **__: int) -> None:
        tried.append(url)
        raise UserError(f"the shard {url} cannot be read")

    monkeypatch.setattr(index_builder, "scan_shard", fail)
    with pytest.raises(UserError, match=r"5 of 1000 shards could not be scanned \(more were not tried after 5\)"):
        build_index("x", "s3://bucket/{000..999}.tar", tmp_path / "index")
    assert len(tried) == 5


def test_counts_beside_the_shards_only_warn(tmp_path: Path) -> None:
    def tell(name: str, told: object) -> None:
        (tmp_path / name).write_text(json.dumps(told))

    for i in range(6):
        write_texts(tmp_path / f"{i}.tar", 0, 5)
    tell("0_stats.json", {"count": 9, "successes": 5, "failed_to_resize": 4})
    tell("1_stats.json", {"count": 9, "successes": 8})
    tell("2_stats.json", {"count": 5, "successes": 3, "failed_to_subsample": 2})  # these write failures into the tar
    (tmp_path / "3_stats.json").write_text("{'not json")
    tell("4_stats.json", {"successes": "many"})
    tell("sizes.json", {"5.tar": 6, "4.tar": 5, "other.tar": 1})
    index = build_index("x", f"{tmp_path}/*.tar", tmp_path / "index")
    assert (index.num_samples, index.num_defects, index.num_disagreements) == (30, 0, 2)
    assert (tmp_path / "index" / "defects.txt").read_text().splitlines() == [
        f"{tmp_path}/1.tar: holds 5 samples, but 1_stats.json beside it says 8",
        f"{tmp_path}/5.tar: holds 5 samples, but sizes.json beside it says 6",
    ]


def test_real_counts_agree(real_data: Path, tmp_path: Path) -> None:
    patterns = [str(real_data / name / "0*.tar") for name in ("laion", "laion_coco", "webvid")]
    index = build_index("x", patterns, tmp_path / "index", workers=2)
    assert (index.num_samples, index.num_disagreements) == (3 * 110 + 72 + 18, 0)


def test_remote_shards_are_read_in_blocks_and_large_members_stepped_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [9_000_000, 100, 200, 300, 12_000_000, 5_000_000, 10]
    path = write_tar(tmp_path / "0.tar", [{"__key__": str(i), "bin": bytes(n), "txt": ""} for i, n in enumerate(sizes)])
    fsspec.filesystem("memory").pipe_file("/scan/0.tar", path.read_bytes())
    reads: list[tuple[int, int]] = []
    real_fetch = shard_scan.fetch_range

    def fetch(url: str, offset: int, nbytes: int) -> Fetched:
        if url.endswith(".tar"):
            reads.append((offset, nbytes))
        return real_fetch(url, offset, nbytes)

    monkeypatch.setattr(shard_scan, "fetch_range", fetch)
    remote = scan_shard("memory://scan/0.tar", 4, 1 << 22)
    local = scan_shard(str(path), 4, 1 << 22)
    assert remote.cuts.tolist() == local.cuts.tolist() and remote.num_samples == 7
    assert len(reads) <= 6 and max(nbytes for _, nbytes in reads) <= REMOTE_BLOCK_BYTES
    assert sum(nbytes for _, nbytes in reads) < path.stat().st_size * 0.7


def test_a_remote_tar_may_end_with_its_last_member(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "0.tar", 0, 3)
    ranges = samples_by_tarfile(str(path))
    fsspec.filesystem("memory").pipe_file("/bare/0.tar", path.read_bytes()[: ranges[-1][1]])
    scan = scan_shard("memory://bare/0.tar", 1, 1 << 22)
    assert [(512 * first, 512 * (first + count)) for first, count, _, _ in scan.cuts.tolist()] == ranges
    assert scan.defects == []


def test_a_shard_that_is_replaced_while_it_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "0.tar", [{"__key__": str(i), "bin": bytes(3_000_000)} for i in range(4)])
    fsspec.filesystem("memory").pipe_file("/replaced/0.tar", path.read_bytes())
    real_fetch = shard_scan.fetch_range

    def fetch(url: str, offset: int, nbytes: int) -> Fetched:
        if offset:
            fsspec.filesystem("memory").pipe_file("/replaced/0.tar", path.read_bytes() + bytes(512))
        return real_fetch(url, offset, nbytes)

    monkeypatch.setattr(shard_scan, "fetch_range", fetch)
    with pytest.raises(UserError, match=r"0\.tar was replaced while it was scanned"):
        scan_shard("memory://replaced/0.tar", 4, 1 << 22)


def test_a_corpus_has_one_fingerprint_here_and_remote(tmp_path: Path) -> None:
    pattern = write_corpus(tmp_path / "corpus")
    for path in (tmp_path / "corpus").iterdir():
        fsspec.filesystem("memory").pipe_file(f"/there/corpus/{path.name}", path.read_bytes())
    here = build_index("x", pattern, tmp_path / "here", **SETTINGS)
    there = build_index("x", "memory://there/corpus/*.tar", tmp_path / "there", **SETTINGS)
    assert here.fingerprint == there.fingerprint and here.num_chunks == there.num_chunks


def hostile(kind: str) -> bytes:
    """Headers that make a careless reader read a gigabyte, or call itself ten thousand times."""
    info = tarfile.TarInfo("a.txt")
    if kind == "huge":
        info.type, info.size = tarfile.XHDTYPE, 1 << 30
        return info.tobuf()
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    return (info.tobuf() + b"a".ljust(512, b"\0")) * 10_000


@pytest.mark.parametrize("kind", ["huge", "deep"])
def test_hostile_headers_are_defects(tmp_path: Path, kind: str) -> None:
    good = write_texts(tmp_path / "good.tar", 0, 3).read_bytes()
    end = samples_by_tarfile(str(tmp_path / "good.tar"))[-1][1]
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(good[:end] + hostile(kind))
        file.truncate(1 << 31)
    scan = scan_shard(str(tmp_path / "0.tar"), 64, 1 << 22)
    assert scan.num_samples == 2 and len(scan.defects) == 1 and f"damaged at byte {end}" in scan.defects[0]


def test_parts_are_read_with_few_open_files(tmp_path: Path) -> None:
    scan = scan_shard(str(write_texts(tmp_path / "0.tar", 0, 3)), 64, 1 << 22)
    for i in range(300):
        with Parts(tmp_path / "index", {}).writer() as write:
            scan.url = str(i)
            write(scan)
    parts = Parts(tmp_path / "index", {})
    places = parts.places()
    most = 0
    for _ in parts.read(places.values()):
        most = max(most, len(list(Path("/proc/self/fd").iterdir())))
    assert len(places) == 300 and most < 100


def test_warnings_name_the_damaged_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    build_index("x", write_corpus(tmp_path / "corpus"), tmp_path / "index", workers=2, **SETTINGS)
    assert [message.split(":")[0] for message in caplog.messages] == [str(tmp_path / "corpus" / "004.tar")]
    assert open_index(tmp_path / "index").num_defects == 1
