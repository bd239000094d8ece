"""Start a job on this machine with the DeepSpeed launcher, one process per device, and end it in order.

    python -m launch.deepspeed --num-procs 8 --run-dir outputs/run -- +experiment=emu_7b total_steps=5000

Bare `deepspeed` leaves orphans or kills loader workers when it is told to stop. Here a TERM, INT or USR1 goes to the
ranks alone (they write their process ids into the run folder), which then have a grace period to save a checkpoint.
What dies by itself, a rank that is killed or stands still, is started again and goes on from the last checkpoint.

Exit codes: 0 done; 2 something to mend, in one sentence; 75 stopped in order by a signal or the run's time limit;
76 died, and starting again has not helped; 128 + n killed by signal n; others: a defect, with a traceback.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from conf import UserError, run_cli
from conf.ports import free_port
from launch.supervise import POLL_S, StopRequest, supervise
from trainer import run_folder

TRAINING_MODULE = "trainer.pretrain"
PREEMPTED_CODE, START_AGAIN_CODE = 75, 76
"""The trainer's (trainer/stop.py, which login nodes cannot import)."""
FREE_S = 60.0
"""So long what they leave behind may take to notice."""


@dataclass
class Job:
    """What to start. grace_s: seconds from a stop signal until whatever still runs is killed.

    restarts: starts after deaths without a further checkpoint in between.
    """

    num_procs: int
    run_dir: Path
    module: str = TRAINING_MODULE
    grace_s: float = 300.0
    restarts: int = 3
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.num_procs < 1:
            raise UserError(f"--num-procs is {self.num_procs}: give the number of devices to use, at least 1")
        if self.grace_s < 0:
            raise UserError(f"--grace-s is {self.grace_s:g}: give the seconds to wait after a stop signal, at least 0")
        if self.restarts < 0:
            raise UserError(f"--restarts is {self.restarts}: give how often to start again, at least 0")


def prepare_run_dir(run_dir: Path) -> None:
    """Make the folder, refuse one that is in use, and drop what an earlier attempt said about its end."""
    run_folder.claim(run_dir).close()
    for stale in [run_dir / "exit.json", *(run_dir / "pids").glob("rank-*.pid")]:
        stale.unlink(missing_ok=True)


def validate_config(job: Job) -> int:
    """Exit code of the trainer's own check, which imports no torch and so takes a second, not a start of all ranks."""
    if job.module != TRAINING_MODULE:
        return 0
    return check_config(_module_args(job), job.num_procs)


def check_config(arguments: list[str], num_procs: int) -> int:
    """Exit code of `trainer.check` for so many processes."""
    command = [sys.executable, "-m", "trainer.check", *arguments]
    environment = {**os.environ, "WORLD_SIZE": str(num_procs)}
    return subprocess.run(command, stdout=subprocess.DEVNULL, env=environment).returncode


def _module_args(job: Job) -> list[str]:
    return [f"run_dir={job.run_dir}", *job.overrides]


def launcher_command(job: Job, visible_devices: str, port: int) -> list[str]:
    """DeepSpeed's launcher of one node, which `deepspeed` itself would start a few seconds later.

    visible_devices: CUDA_VISIBLE_DEVICES, numbers or names; the ranks get the first ones.
    """
    devices = [device.strip() for device in visible_devices.split(",") if device.strip()]
    if devices and len(devices) < job.num_procs:
        raise UserError(
            f"--num-procs is {job.num_procs} but CUDA_VISIBLE_DEVICES={visible_devices} shows {len(devices)} devices: "
            f"lower the one or widen the other."
        )
    world = {"localhost": (devices or [*map(str, range(job.num_procs))])[: job.num_procs]}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level=error"),
        *(f"--world_info={encoded}", "--master_addr=127.0.0.1", f"--master_port={port}"),
        *("--no_local_rank", "--module", job.module, *_module_args(job)),
    ]


def launcher_env(num_procs: int) -> dict[str, str]:
    """The caller's environment; ranks share the cores, and stop by themselves when EMU_LAUNCHER_PID is gone."""
    threads = max(1, (os.cpu_count() or 1) // num_procs)
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "EMU_LAUNCHER_PID": str(os.getpid())}


def read_exit(run_dir: Path, launcher_code: int, stop_requested: bool) -> tuple[int, str]:
    """(code, reason) that rank 0 wrote to `exit.json`, else the launcher's own code (128 + n after signal n).

    When a rank crashes, DeepSpeed tells the others to stop, and rank 0 may report an orderly stop: where nobody asked
    for one, the code of the crash counts.
    """
    if launcher_code < 0:
        launcher_code = 128 - launcher_code
    try:
        record = json.loads((run_dir / "exit.json").read_text())
        code, reason = int(record["code"]), str(record["reason"])
    except FileNotFoundError:
        return launcher_code, "no rank could say why"
    except (ValueError, KeyError, TypeError):
        return launcher_code or 1, "exit.json cannot be read"
    if code not in (0, START_AGAIN_CODE) and launcher_code not in (0, code) and not stop_requested:
        return launcher_code, f"a rank failed; rank 0 then said: {reason}"
    return code, reason


def died(run_dir: Path, code: int) -> bool:
    """Whether a run that nobody has stopped ended by a death that need not happen again: a rank said so, or none could
    say anything. One that has found a defect or a wrong setting says that instead."""
    if code in (0, 2, PREEMPTED_CODE):
        return False
    told, _ = read_exit(run_dir, 0, True)
    return not (run_dir / "exit.json").exists() or told == START_AGAIN_CODE or (told == PREEMPTED_CODE != code)


def wait_until_free(run_dir: Path) -> None:
    """Loader workers of the ranks that died hold the folder until they notice."""
    deadline = time.monotonic() + FREE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(UserError):
            run_folder.claim(run_dir).close()
            return
        time.sleep(POLL_S)


def newest_checkpoint(run_dir: Path) -> str:
    latest = run_dir / "checkpoints" / "latest"
    return latest.read_text() if latest.exists() else ""


def run(job: Job) -> int:
    """Run the job to its end; returns the exit code for the shell."""
    code = validate_config(job)
    if code:
        return code
    stop, starts, checkpoint = StopRequest(), 0, ""
    while True:
        code, reason = run_once(job, stop)
        if stop.signum is not None or not died(job.run_dir, code):
            break
        if checkpoint != (checkpoint := newest_checkpoint(job.run_dir)):
            starts = 0
        if starts == job.restarts:
            reason += f"; started again {starts} times without a further checkpoint"
            break
        starts += 1
        wait_until_free(job.run_dir)
        print(
            f"{job.module} died with code {code} ({reason}): starting it again, {starts} of {job.restarts}", flush=True
        )
    follow_up = "" if code in (0, 2) else "; the same command goes on from the last checkpoint"
    print(f"{job.module} ended with code {code} ({reason}): {job.run_dir}{follow_up}", flush=True)
    return code


def run_once(job: Job, stop: StopRequest) -> tuple[int, str]:
    """One start of all ranks: (exit code, reason)."""
    command = launcher_command(job, os.environ.get("CUDA_VISIBLE_DEVICES", ""), free_port())
    prepare_run_dir(job.run_dir)
    launcher = subprocess.Popen(command, env=launcher_env(job.num_procs), start_new_session=True)
    launcher_code = supervise(launcher, job.run_dir, job.grace_s, stop)
    if stop.signum is not None and stop.count > 1:
        return 128 + stop.signum, "ended at once by a second signal"
    return read_exit(job.run_dir, launcher_code, stop.signum is not None)


def parse_args(argv: list[str] | None = None) -> Job:
    parser = argparse.ArgumentParser(prog="python -m launch.deepspeed", description=__doc__.splitlines()[0])
    parser.add_argument("--num-procs", type=int, required=True, help="processes to start, one per device")
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder; an interrupted run there goes on")
    parser.add_argument("--module", default=TRAINING_MODULE, help="what each process runs (default: %(default)s)")
    parser.add_argument("--grace-s", type=float, default=300.0, help="seconds from stop signal to kill (%(default)s)")
    parser.add_argument("--restarts", type=int, default=3, help="starts again after deaths in a row (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="hydra overrides, after --")
    return Job(**vars(parser.parse_args(argv)))


def main() -> int:
    return run(parse_args())


if __name__ == "__main__":
    run_cli(main)
