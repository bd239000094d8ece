from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from conf import UserError
from data_pipelines import shard_scan
from data_pipelines.index_builder import build_index
from data_pipelines.index_parts import Parts
from data_pipelines.prepare.index import main
from data_pipelines.shards import stat_shard
from tests.data_pipelines.corpora import write_texts


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "data_pipelines.prepare.index", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_that_name(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path, workers: int) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "index"
    corpus.mkdir()
    for i in range(6):
        write_texts(corpus / f"{i}.tar", 10 * i, 5 + i)
    (corpus / "6.tar").touch()
    build_index("x", f"{corpus}/[0-5].tar", tmp_path / "six", chunk_samples=3)
    (corpus / "6.tar").unlink()
    os.mkfifo(corpus / "6.tar")  # opening it waits for ever: the build stands still here
    arguments = ("x", f"{corpus}/[0-6].tar", "--out", out, "--chunk-samples", 3, "--workers", workers)
    build = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.glob("index.parts/*.part"))) == 1)
    settings = {"format": 2, "chunk_samples": 3, "chunk_mb": 4.0}
    wait_for(lambda: len(Parts(out, settings).places()) == 6)
    build.send_signal(signal.SIGKILL)
    build.wait()
    wait_for(lambda: not processes_that_name(str(out)))
    assert not out.exists()
    (corpus / "6.tar").unlink()
    for i in range(6):  # of the same size and time, so a second look would show
        stat = (corpus / f"{i}.tar").stat()
        (corpus / f"{i}.tar").write_bytes(bytes(stat.st_size))
        os.utime(corpus / f"{i}.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    resumed = run("x", f"{corpus}/[0-5].tar", "--out", out, "--chunk-samples", 3, "--workers", workers)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("shards.npy", "chunks.npy", "urls.txt", "defects.txt", "index.json"):
        assert (out / name).read_bytes() == (tmp_path / "six" / name).read_bytes()
    assert not (tmp_path / "index.parts").exists()


@pytest.mark.slow
def test_a_job_array_says_what_comes_next(tmp_path: Path) -> None:
    for i in range(5):
        write_texts(tmp_path / f"{i}.tar", 10 * i, 4)
    damaged = tmp_path / "3.tar"
    damaged.write_bytes(damaged.read_bytes()[:7900])
    (tmp_path / "1_stats.json").write_text('{"successes": 9}')
    patterns = (str(tmp_path / "[0-2].tar"), str(tmp_path / "{3..4}.tar"))
    options = ("--out", tmp_path / "index", "--chunk-mb", 2)
    for task, num_scanned in ((0, 2), (1, 3)):
        told = run("words", *patterns, *options, "--task-id", task, "--num-tasks", 2)
        assert told.returncode == 0, told.stderr
        assert f"task {task} of 2: scanned {num_scanned} shards (0 were scanned before)" in told.stdout
    following = told.stdout.splitlines()[-1].partition("run python ")[2]
    last = subprocess.run(f"{sys.executable} {following}", shell=True, capture_output=True, text=True, timeout=120)
    assert last.returncode == 0, last.stderr
    lines = last.stdout.splitlines()
    assert lines[0].startswith("indexed 19 samples in 5 shards (5 chunks)")
    assert lines[1] == "  damages 1, counts beside shards that disagree 1"
    assert "1_stats.json beside it says 9" in lines[2] and f"{damaged}: cut inside" in lines[3]
    assert lines[-1] == f"next: train with data.sources.words.index={tmp_path / 'index'}"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--task-id", 0), "belong together"),
        (("--task-id", 4, "--num-tasks", 4), "not one of 0 to 3"),
        (("--workers", 0), "--workers must be positive"),
        (("--chunk-samples", 0), "must be positive"),
    ],
)
def test_wrong_options_are_told(options: tuple, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["index", "x", "0.tar", "--out", str(tmp_path / "index"), *map(str, options)])
    with pytest.raises(UserError, match=told):
        main()


@pytest.mark.parametrize(
    ("shard", "told"),
    [
        ("http://127.0.0.1:9/0.tar", r"could not be read in 0 minutes \(.*\): start again .* or leave it out"),
        ("{folder}/0.tar", r"cannot be read \(No such file or directory\): restore it, or change the shard pattern"),
    ],
)
def test_a_shard_out_of_reach_is_told_in_the_words_of_this_command(
    shard: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Options of data belong to training jobs."""
    monkeypatch.setattr(shard_scan, "stat_shard", partial(stat_shard, retry_minutes=0))
    shard = shard.format(folder=tmp_path)
    monkeypatch.setattr(sys, "argv", ["index", "x", shard, "--out", str(tmp_path / "index"), "--workers", "1"])
    with pytest.raises(UserError, match=rf"^the shard \S+0\.tar {told}") as raised:
        main()
    assert "data." not in str(raised.value)
