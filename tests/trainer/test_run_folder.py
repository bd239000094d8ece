from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf import UserError
from data_pipelines.tokenizer import Tokenizer
from tests.conftest import full_disk
from tests.data_pipelines.byte_level import write_byte_level
from trainer import run_folder


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    run_folder.release()


def test_attempts_are_counted_from_one(tmp_path: Path) -> None:
    numbers = []
    for _ in range(3):
        numbers.append(run_folder.start_attempt(tmp_path / "run"))
        run_folder.release()
    assert numbers == [1, 2, 3]


def test_a_folder_in_use_is_refused_and_named_with_its_owner(tmp_path: Path) -> None:
    run_folder.start_attempt(tmp_path)
    with pytest.raises(UserError, match=rf"run_dir={tmp_path} is in use by process {os.getpid()} on .*: stop that run"):
        run_folder.claim(tmp_path)
    run_folder.release()
    run_folder.claim(tmp_path).close()


def test_a_refused_start_leaves_no_trace(tmp_path: Path) -> None:
    run_folder.start_attempt(tmp_path)
    run_folder.write_exit(tmp_path, 0, "done")
    with pytest.raises(UserError):
        run_folder.start_attempt(tmp_path)
    assert (tmp_path / "attempt").read_text() == "1\n"
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 0


def test_a_new_attempt_forgets_how_the_last_one_ended(tmp_path: Path) -> None:
    run_folder.start_attempt(tmp_path)
    run_folder.write_exit(tmp_path, 75, "stopped")
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 75, "reason": "stopped"}
    run_folder.release()
    run_folder.start_attempt(tmp_path)
    assert not (tmp_path / "exit.json").exists()


def test_the_first_word_about_the_end_stands(tmp_path: Path) -> None:
    assert not run_folder.has_ended(tmp_path)
    assert run_folder.write_exit(tmp_path, 2, "a shard is missing")
    assert not run_folder.write_exit(tmp_path, 0, "done")
    assert run_folder.has_ended(tmp_path)
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 2, "reason": "a shard is missing"}


def test_a_start_on_a_full_disk_spoils_none_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.start_attempt(tmp_path)
    run_folder.release()
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", lambda *_: refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            run_folder.start_attempt(tmp_path)
    run_folder.release()
    assert run_folder.start_attempt(tmp_path) == 2
    run_folder.release()
    (tmp_path / "attempt").write_text("")  # as an earlier version left it
    assert run_folder.start_attempt(tmp_path) == 1


def refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_an_ending_that_the_disk_does_not_take(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end itself is not another one; and no empty file says that all has been told."""
    with full_disk(0):
        assert run_folder.write_exit(tmp_path, 76, "a rank stood still")
    assert "it would say: a rank stood still" in caplog.text
    assert not run_folder.has_ended(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_run_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: refuse(number))
    assert run_folder.start_attempt(tmp_path) == 1
    assert "this file system locks no files" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\): choose another folder"):
        run_folder.claim(tmp_path / "file" / "run")


def test_the_run_keeps_its_configuration_process_numbers_and_tokenizer(tmp_path: Path, tokenizer_path: Path) -> None:
    shutil.copy(tokenizer_path, tmp_path / "elsewhere.model")
    run_dir = tmp_path / "run"
    run_folder.start_attempt(run_dir)
    run_folder.write_config(run_dir, {"seed": 3, "sizes": (1, 2)})
    run_folder.write_pid(run_dir, 12)
    assert not run_folder.has_tokenizer(run_dir)
    run_folder.keep_tokenizer(run_dir, Tokenizer(tmp_path / "elsewhere.model"))
    run_folder.keep_tokenizer(run_dir, Tokenizer(run_dir))  # a resumed run may be given its own copy
    assert (run_dir / "config.yaml").read_text() == "seed: 3\nsizes:\n- 1\n- 2\n"
    assert (run_dir / "pids" / "rank-00012.pid").read_text() == f"{os.getpid()}\n"
    assert run_folder.has_tokenizer(run_dir)
    assert (run_dir / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()


def test_the_run_keeps_both_files_of_a_tokenizer_json(tmp_path: Path) -> None:
    write_byte_level(tmp_path / "llama")
    tokenizer = Tokenizer(tmp_path / "llama")
    run_folder.start_attempt(tmp_path / "run")
    run_folder.keep_tokenizer(tmp_path / "run", tokenizer)
    shutil.rmtree(tmp_path / "llama")
    assert run_folder.has_tokenizer(tmp_path / "run")
    assert Tokenizer(tmp_path / "run").digest == tokenizer.digest
