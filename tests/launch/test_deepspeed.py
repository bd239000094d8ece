from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf import UserError
from launch.deepspeed import Job, check_config, died, launcher_command, prepare_run_dir, read_exit
from launch.supervise import read_rank_pids
from tests.launch.stub_job import OBEYED_CODE
from tests.trainer.conftest import corpora, tokenizer_path  # noqa: F401 # fixtures
from tests.trainer.tiny_job import overrides
from trainer import run_folder

ROOT = Path(__file__).resolve().parents[2]


def start(run_dir: Path, behaviour: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.deepspeed", "--num-procs", "2", "--run-dir", str(run_dir), *flags]
    command += ["--module", "tests.launch.stub_job", "--", behaviour]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_ranks(run_dir: Path, count: int = 2) -> list[int]:
    deadline = time.monotonic() + 90
    while len(read_rank_pids(run_dir)) < count:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return list(read_rank_pids(run_dir).values())


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_no_orphans(run_dir: Path, ranks: list[int]) -> None:
    children = [int(path.read_text()) for path in run_dir.glob("child-*")]
    assert len(children) == len(ranks)
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in [*ranks, *children]):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_reaches_the_ranks_and_their_code_comes_back(tmp_path: Path, signum: int) -> None:
    process = start(tmp_path, "obey")
    ranks = wait_for_ranks(tmp_path)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == OBEYED_CODE, output
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == f"stopped by [{signum:d}]"
    assert_no_orphans(tmp_path, ranks)


@pytest.mark.slow
def test_ranks_that_ignore_the_signal_are_killed_after_the_grace(tmp_path: Path) -> None:
    process = start(tmp_path, "ignore", "--grace-s", "1")
    ranks = wait_for_ranks(tmp_path)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert_no_orphans(tmp_path, ranks)


@pytest.mark.slow
def test_signal_before_the_ranks_are_up_is_delivered_later(tmp_path: Path) -> None:
    process = start(tmp_path, "obey")
    while not (tmp_path / "lock").exists():
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate(timeout=90)
    assert process.returncode == OBEYED_CODE, output


@pytest.mark.slow
def test_finished_run_returns_0_and_an_old_exit_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text('{"code": 75, "reason": "of an earlier attempt"}')
    process = start(tmp_path, "finish")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "ended with code 0 (finished)" in output


@pytest.mark.slow
def test_crash_of_one_rank_counts_although_the_others_stop_in_order(tmp_path: Path) -> None:
    process = start(tmp_path, "crash", "--restarts", "0")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 9, output
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == OBEYED_CODE


def test_run_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    lock = run_folder.claim(tmp_path)
    run_folder.write_pid(tmp_path, rank=0)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        prepare_run_dir(tmp_path)
    assert read_rank_pids(tmp_path) == {0: os.getpid()}
    lock.close()
    prepare_run_dir(tmp_path)
    assert read_rank_pids(tmp_path) == {}


def test_unreadable_pid_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    for name, text in {"rank-00000.pid": "", "rank-00001.pid": "-1", "rank-00002.pid": "12\n"}.items():
        (tmp_path / "pids" / name).write_text(text)
    assert read_rank_pids(tmp_path) == {2: 12}


@pytest.mark.parametrize(
    ("text", "launcher_code", "stop_requested", "code"),
    [
        ('{"code": 3, "reason": "x"}', 3, False, 3),
        ('{"code": 75, "reason": "x"}', 1, True, 75),
        ('{"code": 75, "reason": "x"}', 1, False, 1),
        ('{"code": 0, "reason": "finished"}', 1, False, 0),
        (None, 4, False, 4),
        (None, -15, True, 143),
        ("{", 0, False, 1),
        ("[]", 5, True, 5),
    ],
)
def test_exit_code(tmp_path: Path, text: str | None, launcher_code: int, stop_requested: bool, code: int) -> None:
    if text is not None:
        (tmp_path / "exit.json").write_text(text)
    assert read_exit(tmp_path, launcher_code, stop_requested)[0] == code


@pytest.mark.parametrize(
    ("told", "code", "again"),
    [
        (None, 137, True),
        (None, 1, True),
        (None, 2, False),  # refused before anything was written
        (None, 75, False),
        (76, 76, True),
        (75, 137, True),  # rank 0 stopped in order because another died
        (75, 75, False),
        (1, 1, False),
        (2, 137, False),
        (0, 0, False),
    ],
)
def test_what_is_started_again(tmp_path: Path, told: int | None, code: int, again: bool) -> None:
    if told is not None:
        (tmp_path / "exit.json").write_text(json.dumps({"code": told, "reason": "x"}))
    assert died(tmp_path, code) is again


@pytest.mark.slow
@pytest.mark.parametrize(("behaviour", "code"), [("tell", 75), ("vanish", 137)])
def test_ranks_that_are_slow_to_end_do_not_change_the_code(tmp_path: Path, behaviour: str, code: int) -> None:
    """As with NCCL, where no signal reaches a rank that waits for another, and with much memory to give back."""
    process = start(tmp_path, behaviour, "--restarts", "0")
    output, _ = process.communicate(timeout=90)
    assert process.returncode == code, output


def test_the_check_knows_how_many_ranks_there_will_be(
    corpora: Path,  # noqa: F811
    tokenizer_path: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EMU_DATA", str(corpora))
    arguments = overrides(corpora, tokenizer_path, tmp_path / "run")
    assert [check_config(arguments, num_procs) for num_procs in (2, 3)] == [0, 2]


def devices_in(command: list[str]) -> list[object]:
    encoded = next(part.partition("=")[2] for part in command if part.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(encoded))["localhost"]


def test_visible_devices_are_kept(tmp_path: Path) -> None:
    job = Job(num_procs=2, run_dir=tmp_path, overrides=["seed=1"])
    assert devices_in(launcher_command(job, "4,5,6", 29500)) == ["4", "5"]
    assert devices_in(launcher_command(job, "GPU-a,GPU-b", 29500)) == ["GPU-a", "GPU-b"]
    command = launcher_command(job, "", 29500)
    assert devices_in(command) == ["0", "1"]
    assert command[-3:] == ["trainer.pretrain", f"run_dir={tmp_path}", "seed=1"]
    with pytest.raises(UserError, match="shows 1 devices"):
        launcher_command(job, "4", 29500)


@pytest.mark.parametrize("flags", [{"num_procs": 0}, {"num_procs": 1, "grace_s": -1.0}])
def test_senseless_flags_are_refused(tmp_path: Path, flags: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"--(num-procs|grace-s) is"):
        Job(run_dir=tmp_path, **flags)  # type: ignore[arg-type]
