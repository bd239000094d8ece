"""Look for what would stop a job, before it takes GPUs: configuration, versions, disk, shards, tokenizer, devices.

    python -m launch.preflight --run-dir outputs/run --num-procs 8 -- +experiment=emu_7b

Exit code 0 when nothing failed (warnings are allowed), 2 otherwise.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conf import UserError, run_cli
from data_pipelines.config import DataConfig, index_path, training_sources
from data_pipelines.shards import expand_shards, is_local, stat_shard
from launch.memory import CHECKPOINT_BYTES_PER_PARAMETER
from launch.parameters import count_parameters
from trainer import run_folder
from trainer.config import PretrainConfig, compose_config, fill_vocabulary
from trainer.config_checks import data_parallel_size, doubtful, validate

GB = 1e9
DISTRIBUTION = "emu-pretraining"
SHARED_MEMORY_GB = 1.0
MEMORY_FACTS = Path("/proc/meminfo")
DEFAULT_MASTER_PORT = 29500
STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    """status: ok | warn | fail. mend: what to do about it, "" when ok."""

    name: str
    status: str
    detail: str
    mend: str = ""


def check_python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if (3, 10) <= sys.version_info[:2] < (3, 14):
        return Check("python", "ok", version)
    return Check("python", "fail", version, "use Python 3.10 to 3.13")


def check_packages() -> Check:
    """Installed versions against the ranges that this distribution declares."""
    try:
        declared = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return Check("packages", "warn", f"{DISTRIBUTION} is not installed, versions unknown", "make install")
    wanted = [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]
    problems = [problem for item in wanted if (problem := version_problem(item))]
    if problems:
        return Check("packages", "fail", "; ".join(problems), "make install")
    return Check("packages", "ok", f"{len(wanted)} in their ranges, torch {metadata.version('torch')}")


def version_problem(requirement: Requirement) -> str:
    """What is wrong with the installed version, "" if nothing."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is not {requirement.specifier}"


def check_gpus(needed: int) -> Check:
    """needed: on this node."""
    if shutil.which("nvidia-smi") is None:
        return Check("GPUs", "warn", "no nvidia-smi: the job would run on the CPU", "run this on a GPU node")
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    gpus = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    if listing.returncode or not gpus:
        return Check("GPUs", "fail", "nvidia-smi finds no GPU", "look at what nvidia-smi says")
    if len(gpus) < needed:
        mend = "lower --num-procs, or say with --nodes over how many machines they are spread"
        return Check("GPUs", "fail", f"{len(gpus)} for {needed} processes", mend)
    return Check("GPUs", "ok", f"{len(gpus)}: {gpus[0].split('(')[0].strip()}")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Loader workers hand batches over in shared memory; a container has 64 MB of it unless told otherwise."""
    if not folder.is_dir():
        return Check("shared memory", "warn", f"{folder} does not exist", "data.num_workers=0")
    free = shutil.disk_usage(folder).free / GB
    if free < SHARED_MEMORY_GB:
        mend = "docker run --shm-size=16g, or data.num_workers=0"
        return Check("shared memory", "fail", f"{free:.2f} GB free in {folder}", mend)
    return Check("shared memory", "ok", f"{free:.1f} GB free")


def check_port() -> Check:
    port = int(os.environ.get("MASTER_PORT", DEFAULT_MASTER_PORT))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            mend = "start with python -m launch.deepspeed, which finds a free one"
            return Check("port", "warn", f"{port} is taken", mend)
    return Check("port", "ok", f"{port} is free")


def check_run_dir(run_dir: Path) -> Check:
    """Writable and not in use; a folder made only for this check is removed again."""
    existed = run_dir.is_dir()
    run_folder.claim(run_dir).close()
    if not existed:
        shutil.rmtree(run_dir)
    return Check("run folder", "ok", f"{run_dir} is {'there' if existed else 'free'} and writable")


def check_disk(config: PretrainConfig) -> Check:
    """Room for the rolling checkpoints and the one being written."""
    run_dir = Path(config.run_dir).absolute()
    folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    num_parameters = sum(count_parameters(config.model).values())
    needed = (config.checkpoint.keep + 1) * CHECKPOINT_BYTES_PER_PARAMETER * num_parameters / GB
    free = shutil.disk_usage(folder).free / GB
    if free < needed:
        mend = "choose a larger disk with --run-dir, or lower checkpoint.keep"
        return Check("disk", "fail", f"{free:.0f} GB free, checkpoints take {needed:.0f} GB", mend)
    return Check("disk", "ok", f"{free:.0f} GB free, checkpoints take {needed:.2g} GB")


def check_host_memory(config: PretrainConfig, nodes: int) -> Check:
    """Of this node, for the copy of weights and moments that checkpoints are written from; a login node has less."""
    needed = CHECKPOINT_BYTES_PER_PARAMETER * sum(count_parameters(config.model).values()) / nodes / GB
    facts = dict(line.split(":") for line in MEMORY_FACTS.read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024 / GB
    if available < needed:
        mend = "use more nodes: checkpoints are written from a copy of weights and moments in host memory"
        status = "fail" if shutil.which("nvidia-smi") else "warn"
        return Check("host memory", status, f"{available:.0f} GB, a checkpoint's copy takes {needed:.0f} GB", mend)
    return Check("host memory", "ok", f"{available:.0f} GB, a checkpoint's copy takes {needed:.2g} GB")


def check_tokenizer(config: PretrainConfig) -> Check:
    tokenizer = fill_vocabulary(config)
    return Check("tokenizer", "ok", f"{config.data.tokenizer}: {tokenizer.text_vocab_size} pieces")


def check_index(name: str, data: DataConfig) -> Check:
    """A job without it makes it first, on one process, while all others wait."""
    path = index_path(data, name)
    if path.exists():
        return Check(f"index {name}", "ok", str(path))
    command = ["python", "-m", "data_pipelines.prepare.index", name, data.sources[name].shards, "--out", str(path)]
    command += ["--chunk-samples", str(data.chunk_samples), "--chunk-mb", f"{data.chunk_mb:g}"]
    return Check(f"index {name}", "warn", f"{path} is not there: all GPUs would wait for it", shlex.join(command))


def check_source(name: str, pattern: str) -> Check:
    """Every local shard, and the first and the last of remote ones."""
    urls = expand_shards(pattern)
    asked = urls if is_local(urls[0]) else sorted({urls[0], urls[-1]})
    size = sum(stat_shard(url).size for url in asked) / GB
    return Check(f"source {name}", "ok", f"{len(urls)} shards; {size:.3g} GB in the {len(asked)} looked at")


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A UserError as a failed check; its sentence ends with the mend."""
    try:
        return check()
    except UserError as error:
        detail, _, mend = str(error).rpartition(": ")
        return Check(name, "fail", detail or mend, mend if detail else "")


def run_checks(run_dir: Path, num_procs: int, overrides: list[str], nodes: int = 1) -> list[Check]:
    """All checks; those that need the configuration only when it can be composed."""
    checks = [check_python(), check_packages(), check_gpus(num_procs // nodes), check_shared_memory(), check_port()]
    try:
        config = compose_config([f"run_dir={run_dir}", *overrides])
    except UserError as error:
        return [*checks, Check("configuration", "fail", str(error), "mend the overrides after --")]
    checks += [
        guarded("run folder", partial(check_run_dir, run_dir)),
        guarded("tokenizer", partial(check_tokenizer, config)),
        guarded("configuration", partial(check_validity, config, num_procs)),
        guarded("disk", partial(check_disk, config)),
        check_host_memory(config, nodes),
        *(Check("settings", "warn", *sentence.rsplit(": ", maxsplit=1)) for sentence in doubtful(config)),
    ]
    for name, source in training_sources(config.data).items():
        checks += [
            guarded(f"source {name}", partial(check_source, name, source.shards)),
            check_index(name, config.data),
        ]
    return checks


def check_validity(config: PretrainConfig, num_procs: int) -> Check:
    dp_size = data_parallel_size(config.parallel.tensor, num_procs)
    validate(config, dp_size)
    return Check("configuration", "ok", f"valid for {dp_size} data-parallel ranks")


def report(checks: list[Check]) -> Table:
    table = Table("check", "result")
    for column in ("found", "mend"):
        table.add_column(column, overflow="fold")
    for check in checks:
        style = STYLES[check.status]
        table.add_row(check.name, f"[{style}]{check.status}[/{style}]", escape(check.detail), escape(check.mend))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.preflight", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="run folder of the job")
    parser.add_argument("--num-procs", type=int, default=1, help="processes, over all nodes (%(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help="machines they are spread over (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="hydra overrides, after --")
    args = parser.parse_args()
    if args.nodes < 1 or args.num_procs < 1 or args.num_procs % args.nodes:
        raise UserError(
            f"--num-procs {args.num_procs} cannot be spread over --nodes {args.nodes}: give a multiple of it"
        )
    checks = run_checks(args.run_dir, args.num_procs, args.overrides, args.nodes)
    console = Console()
    console.print(report(checks))
    for command in (check.mend for check in checks if check.mend.startswith("python -m")):
        console.print(command, soft_wrap=True, markup=False, highlight=False)  # a table breaks it
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        console.print(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
        return 2
    module, flags = "launch.deepspeed", ["--num-procs", str(args.num_procs)]
    if args.nodes > 1:
        module, of_a_node = "launch.slurm", str(args.num_procs // args.nodes)
        flags = ["--nodes", str(args.nodes), "--gpus-per-node", of_a_node, "--time", "48:00:00"]
    flags += ["--run-dir", str(args.run_dir), "--", *args.overrides]
    console.print(f"Ready; next: python -m {module} {shlex.join(flags)}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    run_cli(main)
