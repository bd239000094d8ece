from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from conf import UserError
from data_pipelines import index as index_module
from data_pipelines.index import Index, etag_hash, open_index
from data_pipelines.index_builder import build_index
from data_pipelines.shards import read_range, stat_shard
from data_pipelines.tar_samples import parse_samples
from tests.data_pipelines.corpora import write_tar, write_texts


def write_corpus(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    write_texts(folder / "0.tar", 0, 10)
    write_texts(folder / "1.tar", 10, 0)
    samples = [{"__key__": f"{i}", "bin": bytes(size)} for i, size in enumerate([1000, 9000, 1000, 1000, 40_000, 500])]
    write_tar(folder / "2.tar", samples)
    return f"{folder}/*.tar"


def names(index: Index) -> list[list[str]]:
    chunks = [index.chunk(number) for number in range(index.num_chunks)]
    slices = [read_range(index.url(chunk.shard), chunk.offset, chunk.nbytes) for chunk in chunks]
    return [[sample.name for sample in parse_samples(data, 1 << 20)] for data in slices]


def test_chunks_hold_whole_samples_within_their_limits(tmp_path: Path) -> None:
    pattern = write_corpus(tmp_path / "corpus")
    index = build_index("x", pattern, tmp_path / "index", chunk_samples=4, chunk_mb=14_000 / 2**20)
    texts = [f"t{i:06d}" for i in range(10)]
    assert names(index) == [texts[:4], texts[4:8], texts[8:], ["0", "1"], ["2", "3"], ["4"], ["5"]]
    assert [index.chunk(i).shard for i in range(7)] == [0, 0, 0, 2, 2, 2, 2]
    assert [index.chunk(i).first_sample for i in range(7)] == [0, 4, 8, 0, 2, 4, 5]
    assert [i for i in range(7) if index.chunk(i).nbytes > 14_000] == [5]
    assert (index.num_shards, index.num_chunks, index.num_samples, index.max_chunk_samples) == (3, 7, 16, 4)


def test_chunk_of_is_the_inverse_of_the_chunks(tmp_path: Path) -> None:
    index = build_index("x", write_corpus(tmp_path / "corpus"), tmp_path / "index", chunk_samples=3)
    for number in range(index.num_chunks):
        chunk = index.chunk(number)
        for sample in range(chunk.first_sample, chunk.first_sample + chunk.num_samples):
            assert index.chunk_of(chunk.shard, sample) == number


def test_an_index_travels_to_other_processes_by_its_path(tmp_path: Path) -> None:
    index = build_index("x", write_corpus(tmp_path / "corpus"), tmp_path / "index")
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    assert pickle.loads(sent).chunk(1) == index.chunk(1)


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = build_index("x", write_corpus(tmp_path / "a"), tmp_path / "index-a")
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "er")
    second = build_index("x", f"{tmp_path}/deep/er/*.tar", tmp_path / "index-b")
    assert first.fingerprint == second.fingerprint
    write_texts(tmp_path / "a" / "0.tar", 0, 11)
    third = build_index("x", f"{tmp_path}/a/*.tar", tmp_path / "index-a")
    fourth = build_index("x", f"{tmp_path}/a/*.tar", tmp_path / "index-c", chunk_samples=5)
    assert len({first.fingerprint, third.fingerprint, fourth.fingerprint}) == 3


@pytest.mark.parametrize("check_on_open", [1000, 0])
def test_changed_and_missing_shards_are_named(
    tmp_path: Path, check_on_open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "CHECK_ON_OPEN", check_on_open)

    def use() -> None:
        open_index(tmp_path / "index").check_shard(0)

    shard = write_texts(tmp_path / "0.tar", 0, 5)
    build_index("x", str(shard), tmp_path / "index")
    use()
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(
        UserError, match=r"index .*index is older than its shard .*0\.tar: run python -m data_pipelines"
    ):
        use()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    use()
    shard.unlink()
    with pytest.raises(UserError, match=r"0\.tar cannot be read"):
        use()


def test_a_shard_that_was_added_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_corpus(tmp_path / "corpus")
    build_index("x", pattern, tmp_path / "index")
    added = write_texts(tmp_path / "corpus" / "3.tar", 20, 5)
    with pytest.raises(UserError, match=r"index .*index is older than its shard .*3\.tar: run python -m .* again$"):
        open_index(tmp_path / "index")
    monkeypatch.setattr(index_module, "CHECK_ON_OPEN", 2)
    open_index(tmp_path / "index")
    monkeypatch.undo()
    added.unlink()
    open_index(tmp_path / "index")


def test_a_relative_pattern_means_nothing_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    build_index("x", "corpus/*.tar", tmp_path / "index")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    open_index(tmp_path / "index")
    write_corpus(tmp_path / "elsewhere" / "corpus")
    open_index(tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "corpus" / "3.tar", 20, 5)
    with pytest.raises(UserError, match=r"3\.tar"):
        open_index(tmp_path / "index")


def test_a_truncated_shard_is_indexed_as_far_as_it_is_whole(real_data: Path, tmp_path: Path) -> None:
    index = build_index("x", str(real_data / "corrupt" / "truncated_tar.tar"), tmp_path / "index")
    assert names(index) == [["000000000", "000000001"]]
    assert "cut inside the member at byte 11264" in (tmp_path / "index" / "defects.txt").read_text()


def test_no_chunk_holds_a_sample_that_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_texts(tmp_path / "0.tar", 0, 4)
    monkeypatch.setattr("tarfile.TarInfo.issparse", lambda info: "t000001" in info.name)
    index = build_index("x", str(shard), tmp_path / "index")
    assert names(index) == [["t000000"], ["t000002", "t000003"]]
    assert index.num_defects == 1


def test_wrong_input_to_build(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.tar cannot be read"):
        build_index("x", str(tmp_path / "missing.tar"), tmp_path / "index")
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match="hold no sample"):
        build_index("x", str(empty), tmp_path / "index")
    assert not (tmp_path / "index").exists()
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="is no index"):
        build_index("x", str(write_texts(tmp_path / "0.tar", 0, 1)), tmp_path / "precious")
    with pytest.raises(UserError, match="no index of a corpus"):
        open_index(tmp_path / "precious")


def test_an_interrupted_build_leaves_no_half_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    shard = str(write_texts(tmp_path / "0.tar", 0, 1))
    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        build_index("x", shard, tmp_path / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "index.parts"]
    monkeypatch.undo()
    build_index("x", shard, tmp_path / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "index"]


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    build_index("x", write_corpus(tmp_path / "corpus"), tmp_path / "index")
    chunks = (tmp_path / "index" / "chunks.npy").read_bytes()
    (tmp_path / "index" / "chunks.npy").write_bytes(chunks[:-16])
    with pytest.raises(UserError, match="is damaged"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(("etags", "is_changed"), [(("a", "a"), False), (("a", "b"), True), (("a", ""), False)])
def test_a_shard_with_another_etag_is_another_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etags: tuple[str, str], is_changed: bool
) -> None:
    shard = str(write_texts(tmp_path / "0.tar", 0, 5))
    before, after = (stat_shard(shard)._replace(etag=etag) for etag in etags)
    build_index("x", shard, tmp_path / "index")
    shards = np.load(tmp_path / "index" / "shards.npy")
    shards["etag_hash"] = etag_hash(before)
    np.save(tmp_path / "index" / "shards.npy", shards)
    monkeypatch.setattr(index_module, "stat_shard", lambda url: after)
    with pytest.raises(UserError, match="older than its shard") if is_changed else nullcontext():
        open_index(tmp_path / "index").check_shard(0)


SPARSE_INDEX = """
import json, sys
from pathlib import Path
import numpy as np
from data_pipelines.index import CHUNK_FIELDS, SHARD_FIELDS

folder, num_shards, num_chunks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
for name, fields, rows in (("shards", SHARD_FIELDS, num_shards), ("chunks", CHUNK_FIELDS, num_chunks)):
    with (folder / f"{name}.npy").open("wb") as file:
        shape = {"descr": np.lib.format.dtype_to_descr(fields), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.truncate(file.tell() + rows * fields.itemsize)
with (folder / "urls.txt").open("wb") as file:
    file.truncate(num_shards * 100)
header = {"format": 2, "source": "x", "patterns": ["s3://x"], "chunk_samples": 64, "chunk_mb": 4.0,
          "num_shards": num_shards, "num_chunks": num_chunks, "num_samples": 64 * num_chunks, "fingerprint": "",
          "max_chunk_samples": 64, "num_defects": 0, "num_disagreements": 0}
(folder / "index.json").write_text(json.dumps(header))
"""
RESIDENT = """
import pickle, sys
from pathlib import Path
from data_pipelines.index import open_index
from data_pipelines.order import Units

def resident_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

before = resident_mb()
index = pickle.loads(pickle.dumps(open_index(sys.argv[1])))
units = Units(index, "x", 0, 8192)
for q in range(0, units.num_units, units.num_units // 40):
    units.unit(q)
print(resident_mb() - before)
"""


def test_an_index_of_a_hundred_million_chunks_is_not_read(tmp_path: Path) -> None:
    def run(code: str, *arguments: object) -> str:
        command = [sys.executable, "-c", code, str(tmp_path / "index"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    run(SPARSE_INDEX, 700_000, 110_000_000)
    assert float(run(RESIDENT)) < 8


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data_pipelines.prepare.index", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    good = run("words", write_corpus(tmp_path / "corpus"), "--out", str(tmp_path / "index"), "--chunk-samples", "5")
    assert good.returncode == 0
    assert good.stdout.startswith("indexed 16 samples in 3 shards (4 chunks)")
    assert f"data.sources.words.index={tmp_path / 'index'}" in good.stdout
    bad = run("words", "nothing-*.tar", "--out", str(tmp_path / "other"))
    assert (bad.returncode, bad.stderr) == (2, "error: no shard matches 'nothing-*.tar': check the path\n")
