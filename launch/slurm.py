"""Write one readable batch script for a Slurm cluster into the run folder, and submit it if asked.

    python -m launch.slurm --nodes 4 --gpus-per-node 8 --time 48:00:00 --run-dir outputs/run -- +experiment=emu_14b

One task per GPU. Ten minutes before the time limit (--warning-s) the ranks get USR1, save a checkpoint and end with
the preemption code; the script then puts the job back into the queue, and it goes on from there. So it does when a rank
has died.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from conf import UserError, run_cli
from launch.deepspeed import PREEMPTED_CODE, START_AGAIN_CODE, TRAINING_MODULE, check_config

TIME_LIMIT = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
SLURM_NAME = re.compile(r"[A-Za-z0-9_.,@+-]+")


@dataclass
class SlurmJob:
    """A batch job. time: as sbatch takes it, [days-]hours:minutes:seconds. env_file: shell file to source first.

    container: image for srun's --container-image (pyxis); container_mounts: more mounts, src:dst[,src:dst].
    cpu: ask for no GPUs; gpus_per_node then counts processes. mem: of a node, as sbatch takes it; 0 = all of it.
    warning_s: so long before the time limit the ranks save. restarts: after deaths without a further checkpoint.
    """

    nodes: int
    gpus_per_node: int
    time: str
    run_dir: Path
    cpus_per_task: int = 8
    mem: str = "0"
    warning_s: int = 600
    restarts: int = 3
    job_name: str = "emu"
    partition: str = ""
    account: str = ""
    container: str = ""
    container_mounts: str = ""
    env_file: str = ""
    python: str = sys.executable
    module: str = TRAINING_MODULE
    cpu: bool = False
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for flag in ("nodes", "gpus_per_node", "cpus_per_task"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}: give at least 1")
        if self.warning_s < 1:
            raise UserError(f"--warning-s is {self.warning_s}: give the seconds that two checkpoints and a step take")
        if self.restarts < 0:
            raise UserError(f"--restarts is {self.restarts}: give how often to start again, at least 0")
        if not TIME_LIMIT.fullmatch(self.time):
            raise UserError(f"--time {self.time!r} is not a Slurm time limit: write it as 48:00:00 or 2-00:00:00")
        for flag in ("job_name", "partition", "account", "mem"):
            value = getattr(self, flag)
            if value and not SLURM_NAME.fullmatch(value):
                raise UserError(f"--{flag.replace('_', '-')} {value!r} is not a Slurm name: use letters, digits, _ . -")
        if self.env_file and not Path(self.env_file).is_file():
            raise UserError(f"--env-file {self.env_file} is not a file: give a shell file to source, or leave it out")
        self.run_dir = self.run_dir.absolute()
        if re.search(r"[\s%\\]", str(self.run_dir)):
            raise UserError(f"--run-dir {self.run_dir} has a blank, % or \\ in it: Slurm cannot write its log there")


def module_arguments(job: SlurmJob) -> list[str]:
    return [f"run_dir={job.run_dir}", *job.overrides]


def render_script(job: SlurmJob, project: Path) -> str:
    """The batch script as text. Every value that the user gave is quoted for the shell."""
    environment = Environment(
        loader=PackageLoader("launch"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template("slurm.sbatch.j2").render(
        **asdict(job),
        project=project,
        arguments=shlex.join(module_arguments(job)),
        preempted_code=PREEMPTED_CODE,
        start_again_code=START_AGAIN_CODE,
    )


def write_script(job: SlurmJob, project: Path) -> Path:
    """Write `<run>/job.sbatch`; returns its path."""
    path = job.run_dir / "job.sbatch"
    try:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(render_script(job, project) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --run-dir") from None
    return path


def can_check_here(job: SlurmJob) -> bool:
    """Whether this machine sees what the nodes will see: a container or a sourced file may change it."""
    return job.module == TRAINING_MODULE and not job.container and not job.env_file and job.python == sys.executable


def submit(script: Path) -> str:
    """Hand the script to sbatch; returns what it says."""
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("sbatch is not on this machine: run on a login node of the cluster, without --submit") from None
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def parse_args(argv: list[str] | None = None) -> tuple[SlurmJob, bool]:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True, help="one task is started on each")
    parser.add_argument("--time", required=True, help="time limit of one segment, e.g. 48:00:00")
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder, on storage that all nodes see")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="for a rank and its loader workers (%(default)s)")
    parser.add_argument("--mem", default="0", help="memory of a node, as sbatch takes it (%(default)s: all of it)")
    parser.add_argument(
        "--warning-s", type=int, default=600, help="save so long before the time limit; two checkpoints (%(default)s)"
    )
    parser.add_argument("--restarts", type=int, default=3, help="starts again after deaths in a row (%(default)s)")
    parser.add_argument("--job-name", default="emu")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--container", default="", help="image for srun's --container-image (pyxis)")
    parser.add_argument("--container-mounts", default="", help="mounts beside project and run folder: src:dst,..")
    parser.add_argument("--env-file", default="", help="shell file that the script sources first")
    parser.add_argument("--python", default=sys.executable, help="interpreter on the nodes (default: this one)")
    parser.add_argument("--module", default=TRAINING_MODULE, help="what each task runs (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="ask for no GPUs: --gpus-per-node counts processes")
    parser.add_argument("--submit", action="store_true", help="hand the script to sbatch")
    parser.add_argument("overrides", nargs="*", help="hydra overrides, after --")
    options = vars(parser.parse_args(argv))
    wants_submit = options.pop("submit")
    return SlurmJob(**options), wants_submit


def main() -> None:
    job, wants_submit = parse_args()
    if can_check_here(job) and (code := check_config(module_arguments(job), job.nodes * job.gpus_per_node)):
        sys.exit(code)
    script = write_script(job, Path.cwd())
    if wants_submit:
        print(f"{submit(script)}: {script}; follow it with tail -F {job.run_dir}/slurm-*.log")
    else:
        print(f"wrote {script}; read it, then: sbatch {script}")


if __name__ == "__main__":
    run_cli(main)
