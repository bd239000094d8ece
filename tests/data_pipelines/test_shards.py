from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from conf import UserError
from data_pipelines.shards import expand_shards, open_shard, read_range, stat_shard


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
