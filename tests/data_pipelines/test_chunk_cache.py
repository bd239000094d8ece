from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from conf import UserError
from data_pipelines.chunk_cache import ChunkCache


def refuse() -> bytes:
    raise AssertionError("it is in the cache")


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.chunk"))


def test_what_was_fetched_is_kept(tmp_path: Path) -> None:
    data = os.urandom(1000)
    assert ChunkCache(tmp_path / "new" / "cache", 10**6).get(("url", 0), lambda: data) == data
    cache = ChunkCache(tmp_path / "new" / "cache", 10**6)
    assert cache.get(("url", 0), refuse) == data
    assert cache.get(("url", 1), lambda: b"") == b""
    assert cache.get(("url", 1), refuse) == b""
    (path, _) = sorted(entries(tmp_path / "new" / "cache"), key=lambda path: -path.stat().st_size)
    assert "url" not in str(path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_entries_are_fetched_again(tmp_path: Path, damage: str) -> None:
    cache = ChunkCache(tmp_path, 10**6)
    cache.get(("url", 0), lambda: b"whole" * 100)
    (path,) = entries(tmp_path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "flipped": content[:-1] + b"X", "empty": b""}[damage])
    assert cache.get(("url", 0), lambda: b"again") == b"again"
    assert cache.get(("url", 0), refuse) == b"again"


def test_the_least_recently_used_entries_make_room(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 10_000)
    for number in range(9):
        cache.get(("url", number), lambda: bytes(1000))
    for age, path in enumerate(sorted(entries(tmp_path), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, ns=(0, 10**9 * (age + 1)))
    cache.get(("url", 0), refuse)  # used just now, and so the youngest
    cache.get(("url", 9), lambda: bytes(1000))
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 10_000
    assert cache.get(("url", 0), refuse) == cache.get(("url", 9), refuse) == bytes(1000)
    assert cache.get(("url", 1), lambda: b"again") == b"again"


def test_the_bound_holds_for_a_folder_whose_size_is_unknown(tmp_path: Path) -> None:
    for number in range(20):
        ChunkCache(tmp_path, 10**6).get(("url", number), lambda: bytes(1000))
    (tmp_path / "size").write_text("nonsense")
    ChunkCache(tmp_path, 5_000).get(("other",), lambda: bytes(1000))
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 5_000


def fetch_slowly(folder: Path, fetched: Path, start: object) -> None:
    def fetch() -> bytes:
        with fetched.open("a") as file:
            file.write("x")
        return b"data" * 1000

    start.wait()  # type: ignore[attr-defined]
    cache = ChunkCache(folder, 10**6)
    assert [cache.get(("url", number), fetch) for number in range(20)] == [b"data" * 1000] * 20


def test_processes_share_what_one_of_them_fetched(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [
        context.Process(target=fetch_slowly, args=(tmp_path / "cache", tmp_path / "fetched", start)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "fetched").read_text() == "x" * 20


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ChunkCache(tmp_path, 10**6)

    def no_space(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    assert cache.get(("url", 0), lambda: b"data") == b"data"
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data\.cache_dir=\S*file/cache cannot be written[^\n]*$"):
        ChunkCache(tmp_path / "file" / "cache", 10**6)
