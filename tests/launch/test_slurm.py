from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf import UserError
from launch.deepspeed import PREEMPTED_CODE, START_AGAIN_CODE
from launch.slurm import SlurmJob, can_check_here, main, parse_args, render_script, submit, write_script
from trainer.stop import START_AGAIN, STOPPED_BY_SIGNAL

ROOT = Path(__file__).resolve().parents[2]


def make_job(folder: Path, **changes: object) -> SlurmJob:
    values: dict[str, object] = {"nodes": 2, "gpus_per_node": 8, "time": "48:00:00", "run_dir": folder}
    return SlurmJob(**{**values, **changes})  # type: ignore[arg-type]


def bash_accepts(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"partition": "gpu", "account": "lab"}, {"cpu": True}, {"container": "img.sqsh", "container_mounts": "/d:/d"}],
)
def test_script_is_valid_shell(tmp_path: Path, changes: dict[str, object]) -> None:
    script = render_script(make_job(tmp_path, **changes), ROOT)
    assert bash_accepts(script)
    directives = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=2", "ntasks-per-node=8", "requeue", "signal=B:USR1@600", "mem=0"} <= set(directives)
    assert ("gpus-per-node=8" in directives) is not changes.get("cpu", False)
    assert ("partition=gpu" in directives) is ("partition" in changes)
    assert ("--container-image=img.sqsh" in script) is ("container" in changes)


def fake_cluster(folder: Path, rank_code: int, warned: bool) -> dict[str, str]:
    """Stand-ins on the PATH: `srun` runs the task once as rank 3, `scontrol` notes what it is asked.

    warned: while the task runs, the script gets the signal of the coming time limit.
    """
    warning = "trap : USR1; kill -USR1 $PPID; sleep 0.3" if warned else ":"
    commands = {
        "scontrol": f'echo "$*" >> {folder}/scontrol.log; [ "$1" = requeue ] || printf "node1\\nnode2\\n"',
        "srun": f'{warning}; while [ "$1" != bash ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 "$@"',
        "task-python": f'printf "%s\\n" "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR" "$@" > {folder}/task.log\n'
        f"exit {rank_code}",
    }
    for name, body in commands.items():
        write_command(folder / name, body)
    slurm = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    return {"PATH": f"{folder}:{os.environ['PATH']}", **slurm}


def write_command(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_script_gives_ranks_their_place_and_quotes_overrides(tmp_path: Path) -> None:
    tricky = "init.vision_encoder=a b'; touch owned; $(touch owned)"
    job = make_job(tmp_path / "run", python="task-python", module="trainer.other", overrides=["seed=1", tricky])
    script = write_script(job, tmp_path)
    subprocess.run(["bash", str(script)], env=fake_cluster(tmp_path, 0, warned=False), check=True)
    task, *arguments = (tmp_path / "task.log").read_text().splitlines()
    assert task == "3/4 1 node1"
    assert arguments == ["-u", "-m", "trainer.other", f"run_dir={tmp_path / 'run'}", "seed=1", tricky]
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("rank_code", "warned", "requeued"),
    [
        (0, True, False),
        (2, True, False),
        (PREEMPTED_CODE, False, False),
        (PREEMPTED_CODE, True, True),
        (START_AGAIN_CODE, False, True),
        (137, False, True),  # killed, and no rank could say so
        (1, False, True),
    ],
)
def test_script_requeues_what_the_time_limit_stopped(
    tmp_path: Path, rank_code: int, warned: bool, requeued: bool
) -> None:
    script = write_script(make_job(tmp_path / "run", python="task-python", module="trainer.other"), tmp_path)
    done = subprocess.run(["bash", str(script)], env=fake_cluster(tmp_path, rank_code, warned))
    assert done.returncode == rank_code
    assert ("requeue 12" in (tmp_path / "scontrol.log").read_text()) is requeued


@pytest.mark.parametrize(
    ("requeues", "deaths", "saves", "requeued"),
    [
        (9, 2, False, True),  # most were for the time limit
        (9, 3, False, False),
        (9, 3, True, True),
        (0, 3, False, True),  # submitted by hand
    ],
)
def test_what_dies_again_and_again_is_requeued_while_it_saves(
    tmp_path: Path, requeues: int, deaths: int, saves: bool, requeued: bool
) -> None:
    script = write_script(make_job(tmp_path / "run", python="task-python", module="trainer.other"), tmp_path)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.parent.mkdir()
    latest.write_text("step-00000010")
    (tmp_path / "run" / "deaths").write_text(f"{deaths}\n")
    cluster = fake_cluster(tmp_path, 137, warned=False) | {"SLURM_RESTART_COUNT": str(requeues)}
    if saves:
        write_command(tmp_path / "task-python", f"printf step-00000020 > {latest}\nexit 137")
    subprocess.run(["bash", str(script)], env=cluster)
    assert ("requeue 12" in (tmp_path / "scontrol.log").read_text()) is requeued
    left = 1 if saves or not requeues else 3
    assert (tmp_path / "run" / "deaths").read_text() == f"{left}\n"


@pytest.mark.parametrize(("rank_0_wrote", "code", "requeued"), [(True, 2, False), (False, 137, True)])
def test_the_code_of_this_attempts_rank_0_counts(tmp_path: Path, rank_0_wrote: bool, code: int, requeued: bool) -> None:
    """Not how the last rank ended that Slurm had to kill, and not the code of an attempt before."""
    script = write_script(make_job(tmp_path / "run", python="task-python", module="trainer.other"), tmp_path)
    cluster = fake_cluster(tmp_path, 137, warned=False)
    exit_json = tmp_path / "run" / "exit.json"
    exit_json.write_text('{"code": 3, "reason": "of before"}')
    if rank_0_wrote:
        write_command(tmp_path / "task-python", f"""echo '{{"code": 2}}' > {exit_json}; exit 137""")
    assert subprocess.run(["bash", str(script)], env=cluster).returncode == code
    assert ("requeue 12" in (tmp_path / "scontrol.log").read_text()) is requeued


def test_a_cancelled_job_waits_for_its_ranks(tmp_path: Path) -> None:
    """scancel's signal comes to the script as well, which must tell the code that the ranks end with."""
    script = write_script(make_job(tmp_path / "run", python="task-python", module="trainer.other"), tmp_path)
    cluster = fake_cluster(tmp_path, 0, warned=False)
    write_command(tmp_path / "srun", f"kill -TERM $PPID; sleep 0.3; exit {PREEMPTED_CODE}")
    done = subprocess.run(["bash", str(script)], env=cluster, stdout=subprocess.PIPE, text=True)
    assert done.returncode == PREEMPTED_CODE
    assert f"job 12 ended with code {PREEMPTED_CODE}" in done.stdout
    assert "requeue 12" not in (tmp_path / "scontrol.log").read_text()


def test_codes_are_the_trainers() -> None:
    assert (STOPPED_BY_SIGNAL, START_AGAIN) == (PREEMPTED_CODE, START_AGAIN_CODE)


def test_submit_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        submit(tmp_path / "job.sbatch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes is 0"),
        ({"gpus_per_node": -1}, "--gpus-per-node is -1"),
        ({"time": "two days"}, "--time 'two days'"),
        ({"time": "48:00:00\n#SBATCH --wrap=x"}, "--time"),
        ({"partition": "a b"}, "--partition 'a b'"),
        ({"env_file": "missing.sh"}, "--env-file missing.sh"),
        ({"run_dir": Path("a b")}, "--run-dir"),
    ],
)
def test_wrong_flags_are_one_sentence(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_job(tmp_path, **changes)


@pytest.mark.parametrize("time", ["30", "90:00", "48:00:00", "2-0", "2-00:00", "2-00:00:00"])
def test_time_limits_that_slurm_knows(tmp_path: Path, time: str) -> None:
    assert make_job(tmp_path, time=time).time == time


def test_wrong_overrides_are_refused_before_the_job_waits_in_a_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--nodes", "1", "--gpus-per-node", "3", "--time", "10", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["slurm", *flags, "--", "data.tokenizer=/nowhere"])
    monkeypatch.setenv("EMU_DATA", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert not can_check_here(make_job(tmp_path, container="image.sqsh"))


def test_command_line(tmp_path: Path) -> None:
    flags = ["--nodes", "1", "--gpus-per-node", "2", "--time", "10", "--run-dir", str(tmp_path), "--", "a=1", "~b"]
    job, wants_submit = parse_args(flags)
    assert job.overrides == ["a=1", "~b"]
    assert not wants_submit
    assert job.python == sys.executable
