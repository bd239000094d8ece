from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from conf import UserError
from data_pipelines import retries
from data_pipelines.shards import expand_shards, fetch_range, open_shard, read_range, stat_shard
from tests.data_pipelines.faulty_server import FAULTS, serving


def test_expand_path_glob_and_braces(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b [x] {y}.tar", "c.txt"):
        (tmp_path / name).touch()
    paths = [str(tmp_path / f"a-{i}.tar") for i in (0, 1)]
    assert expand_shards(f"{tmp_path}/a-*.tar") == paths
    assert expand_shards(f"file://{tmp_path}/a-*.tar") == paths
    assert expand_shards(f"{tmp_path}/a-{{1..0}}.tar") == paths
    assert expand_shards(f"{tmp_path}/{{a-*,a-1}}.tar") == paths
    assert expand_shards(f"{tmp_path}/b [x] {{y}}.tar") == [str(tmp_path / "b [x] {y}.tar")]
    assert expand_shards("s3://bucket/{00..01}.tar") == ["s3://bucket/00.tar", "s3://bucket/01.tar"]


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert expand_shards("a.tar") == expand_shards("*.tar") == [str(tmp_path / "a.tar")]


@pytest.mark.parametrize("pattern", ["nothing-*.tar", "x{1..3", "pipe:cat x.tar", "{pipe:cat x.tar,y}", "."])
def test_bad_patterns_are_refused(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        expand_shards(pattern)


def test_ranges_of_local_and_remote_shards(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    (tmp_path / "a.tar").write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/shards/a.tar", data)
    assert expand_shards("memory://shards/*.tar") == ["memory:///shards/a.tar"]
    for url in (str(tmp_path / "a.tar"), "memory://shards/a.tar"):
        assert stat_shard(url).size == len(data)
        assert read_range(url, 100, 300) == data[100:400]
        with open_shard(url) as stream:
            stream.seek(50)
            assert stream.read(5) == data[50:55]
        with pytest.raises(UserError, match="ends before byte 2600"):
            read_range(url, 2000, 600)


@pytest.mark.parametrize("url", ["missing.tar", "memory://missing.tar", "nonsense://x.tar"])
def test_what_cannot_be_reached_is_named(url: str) -> None:
    for call in (stat_shard, open_shard, lambda url: read_range(url, 0, 1)):
        with pytest.raises(UserError, match=url):
            call(url)


def test_ranges_and_versions_over_http(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "empty.tar").touch()
    with serving(tmp_path) as server:
        url = f"{server.url}/a.tar"
        stat = stat_shard(url)
        assert (stat.size, stat.mtime_ns) == (len(data), 0)
        assert stat.etag
        assert read_range(url, 100, 300) == data[100:400]
        past_the_end = fetch_range(url, 2500, 100)
        assert (past_the_end.data, past_the_end.stat) == (data[2500:], stat)
        assert fetch_range(url, 5000, 100).data == b""
        assert stat_shard(f"{server.url}/empty.tar").size == 0
        with open_shard(url) as stream:
            assert stream.seek(-60, 2) == len(data) - 60
            assert stream.read() == data[-60:]
        (tmp_path / "a.tar").write_bytes(data[::-1])
        assert stat_shard(url).size == stat.size
        assert stat_shard(url).etag != stat.etag


@pytest.mark.parametrize("fault", FAULTS)
def test_every_failure_of_a_server_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    (tmp_path / "a.tar").write_bytes(b"0123456789" * 100)
    with serving(tmp_path) as server:
        planned = iter([fault, fault, ""])
        monkeypatch.setattr(server, "note", lambda wanted: next(planned))
        fetched = fetch_range(f"{server.url}/a.tar", 10, 500, timeout_s=0.3)
        assert fetched.data == b"0123456789" * 50
        assert list(planned) == []


def test_a_server_that_is_not_there_is_named_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"^the shard http://127\.0\.0\.1:9/a\.tar could not .* \(.*refused\): [^\n]*$"):
        fetch_range("http://127.0.0.1:9/a.tar", 0, 1, retry_minutes=0)


def test_a_question_mark_begins_the_query_of_a_web_address() -> None:
    assert expand_shards("https://host/a.tar?signature=x") == ["https://host/a.tar?signature=x"]
