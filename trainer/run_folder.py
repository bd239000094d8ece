"""The run folder: who owns it, which attempt this is, and how the run ended.

<run>/config.yaml      the resolved configuration of the newest attempt
<run>/attempt          number of starts so far
<run>/tokenizer.*      the tokenizer that the model was trained with
<run>/lock             held while a run writes here
<run>/pids/            process numbers of the ranks, for the launcher's signals
<run>/exit.json        {"code", "reason"} of the newest attempt
<run>/unreachable.jsonl  what data.skip_unreachable passed over, a line a unit
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from conf import UserError
from data_pipelines.tokenizer import JSON, SENTENCEPIECE, Tokenizer

log = logging.getLogger(__name__)

_held: list[IO[str]] = []
"""Lock files of this process: closing one, or the end of the process, lets its folder go."""


def start_attempt(run_dir: Path) -> int:
    """Take the folder for this process and return the number of this start, from 1. UserError if it is in use."""
    _held.append(claim(run_dir))
    path = run_dir / "attempt"
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    number = int(text) + 1 if text.isdecimal() else 1
    temporary = path.with_name(".attempt")  # a full disk must not leave an empty file
    temporary.write_text(f"{number}\n")
    temporary.replace(path)
    (run_dir / "exit.json").unlink(missing_ok=True)  # it told of the attempt before
    return number


def release() -> None:
    """Let go of every folder taken by `start_attempt` (for processes that run several jobs)."""
    while _held:
        _held.pop().close()


def claim(run_dir: Path) -> IO[str]:
    """Take the folder's lock; it is let go when the returned file closes or the process ends, however it ends."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "lock").open("a+")
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written ({error.strerror}): choose another folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        raise UserError(f"run_dir={run_dir} is in use by {owner}: stop that run or choose another folder") from error
    except OSError as error:
        log.warning(
            "%s: this file system locks no files (%s), so nothing keeps a second run out of the folder",
            run_dir,
            error.strerror,
        )
        return lock
    lock.truncate(0)
    with contextlib.suppress(OSError):  # only for the sentence above
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    return lock


def write_config(run_dir: Path, resolved: dict[str, Any]) -> None:
    OmegaConf.save(OmegaConf.create(resolved), run_dir / "config.yaml")


def keep_tokenizer(run_dir: Path, tokenizer: Tokenizer) -> None:
    """Copy the tokenizer into the run, which is useless without it."""
    for name, file in tokenizer.files.items():
        if file.resolve() != (run_dir / name).resolve():
            shutil.copyfile(file, run_dir / name)


def has_tokenizer(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in (SENTENCEPIECE, JSON))


def write_pid(run_dir: Path, rank: int) -> None:
    folder = run_dir / "pids"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank:05d}.pid").write_text(f"{os.getpid()}\n")


def write_exit(run_dir: Path, code: int, reason: str) -> bool:
    """Tell how the attempt ended, if the disk takes it. False if another rank has told before: its word stands."""
    try:
        with (run_dir / "exit.json").open("x") as file:
            file.write(json.dumps({"code": code, "reason": reason}) + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        (run_dir / "exit.json").unlink(missing_ok=True)  # an empty one would say that all is told
        log.warning("%s/exit.json could not be written (%s); it would say: %s", run_dir, error.strerror, reason)
    return True


def has_ended(run_dir: Path) -> bool:
    return (run_dir / "exit.json").exists()
