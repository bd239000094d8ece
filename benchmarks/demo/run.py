"""The whole road in one command: ``python -m benchmarks.demo.run``.

Draws four corpora, trains a vision encoder contrastively, pretrains a small Emu on two processes (interrupted half-way
and resumed), exports it, asks the exported package about scenes it has never seen, checks the answers, and writes a
report. Every stage is a process of its own, the command that one would type.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.demo.check import summary
from benchmarks.demo.resume import check_resume
from conf import UserError, run_cli
from trainer import run_folder
from trainer.config import PretrainConfig, compose_config

NUM_PROCS = 2
REPEATED_STEPS = 5
DEFAULT_OUT = Path("outputs/demo")
REMOVED_AT_START = ("run", "resume_check", "resume.json", "predictions", "logs", "report.html")


@dataclass(frozen=True)
class Stage:
    """name: of its log. command: arguments of python. trained: what it leaves behind, if it can be kept for another
    demo."""

    name: str
    title: str
    command: list[str]
    trained: Path | None = None
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """overrides: of every training command. stop: the step at which the first attempt is cut off, a few steps after the
    checkpoint of step `checkpoint`, from which the second one goes on."""

    out: Path
    overrides: list[str]
    total_steps: int
    checkpoint: int
    stop: int

    @property
    def run_dir(self) -> Path:
        return self.out / "run"

    def checkpoint_folder(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step-{step:08d}"

    @property
    def set_aside(self) -> Path:
        return self.out / "resume_check" / self.checkpoint_folder(self.stop).name


def make_plan(out: Path, extra: list[str]) -> Plan:
    """UserError if the settings leave no room for an interruption."""
    base = ["+experiment=demo", *extra]
    config = compose_config(base)
    every = config.checkpoint.every_steps
    half = every * max(1, round(config.total_steps / 2 / every)) if every else 0
    if not 0 < half + REPEATED_STEPS < config.total_steps:
        raise UserError(
            f"total_steps={config.total_steps} and checkpoint.every_steps={every} leave no checkpoint to resume from "
            f"half-way: raise the one or lower the other"
        )
    # Keeps the second attempt's checkpoint of the step at which the first one stopped, to compare the two.
    keep_for_comparison = f"checkpoint.permanent_every_steps={half + REPEATED_STEPS}"
    overrides = [*base, *moved_paths(config, out), keep_for_comparison]
    return Plan(out, overrides, config.total_steps, half, half + REPEATED_STEPS)


def moved_paths(config: PretrainConfig, out: Path) -> list[str]:
    """Overrides that move everything below `outputs/demo` to `out`."""
    if out == DEFAULT_OUT:
        return []
    paths = {
        "run_dir": config.run_dir,
        "init.vision_encoder": config.init.vision_encoder,
        "data.tokenizer": config.data.tokenizer,
        "data.index_dir": config.data.index_dir,
        **{f"data.sources.{name}.shards": source.shards for name, source in config.data.sources.items()},
    }
    return [f"{key}={out / Path(value).relative_to(DEFAULT_OUT)}" for key, value in paths.items()]


def make_stages(plan: Plan) -> list[Stage]:
    out = plan.out
    demo = ["--out", str(out)]
    launcher = ["-m", "launch.deepspeed", f"--num-procs={NUM_PROCS}", f"--run-dir={plan.run_dir}", "--"]
    pretrain = [*launcher, *plan.overrides]
    one_thread = {"OMP_NUM_THREADS": "1"}
    return [
        Stage(
            "corpora",
            "Draw four corpora: pairs, pages, clips, storyboards",
            ["-m", "data_pipelines.prepare.demo", "--out", str(out / "corpora")],
        ),
        Stage(
            "vision_encoder",
            "Train a vision encoder contrastively (the demo's EVA-CLIP)",
            ["-m", "trainer.contrastive", *plan.overrides],
            trained=out / "vision_encoder.safetensors",
        ),
        Stage(
            "pretrain_1",
            f"Pretrain on {NUM_PROCS} processes, cut off after step {plan.stop} of {plan.total_steps}",
            [*pretrain, f"stop_after_step={plan.stop}"],
            trained=plan.set_aside,
            env=one_thread,
        ),
        Stage(
            "pretrain_2",
            f"Resume from the checkpoint of step {plan.checkpoint}, train to the end",
            pretrain,
            trained=plan.checkpoint_folder(plan.total_steps),
            env=one_thread,
        ),
        Stage(
            "export",
            "Export a package that needs none of the training code",
            ["-m", "trainer.export", f"run_dir={plan.run_dir}"],
        ),
        Stage(
            "predict",
            "Ask the package, with the training packages out of reach",
            ["-m", "benchmarks.demo.predict", *demo],
        ),
        Stage("check", "Check its answers", ["-m", "benchmarks.demo.check", *demo]),
        Stage("report", "Write the report", ["-m", "benchmarks.demo.report", *demo]),
    ]


def run_stages(plan: Plan, keep: bool) -> None:
    """Run what there is to run, in order; UserError at the first stage that fails."""
    stages = make_stages(plan)
    seconds = read_json(plan.out / "stages.json") if keep else {}
    start = time.monotonic()
    for number, stage in enumerate(stages, start=1):
        elapsed = time.strftime("%M:%S", time.gmtime(time.monotonic() - start))
        print(f"\n=== {number}/{len(stages)}  {stage.title}  ({elapsed})", flush=True)
        if keep and stage.trained and stage.trained.exists():
            print(f"kept: {stage.trained}")
        else:
            seconds[stage.name] = run_stage(stage, plan.out / "logs")
            if stage.name == "pretrain_1":
                forget_last_steps(plan)
        if stage.name == "pretrain_2":
            write_resume_check(plan)
        (plan.out / "stages.json").write_text(json.dumps(seconds, indent=1) + "\n")


def run_stage(stage: Stage, logs: Path) -> float:
    """Show the process's output as it comes and keep it; returns the seconds it took."""
    print(f"python {' '.join(stage.command)}", flush=True)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{stage.name}.log"
    env = {**os.environ, **stage.env, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *stage.command]
    start = time.monotonic()
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env) as process,
    ):
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 65536):
            file.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    if process.returncode:
        raise UserError(
            f"the stage {stage.title!r} failed with code {process.returncode}: read the end of {log}, mend the cause "
            f"and run this again"
        )
    return round(time.monotonic() - start, 1)


def forget_last_steps(plan: Plan) -> None:
    """Leave the run as a kill would have: without the checkpoint of the stop, which is moved aside."""
    plan.set_aside.parent.mkdir(parents=True, exist_ok=True)
    plan.checkpoint_folder(plan.stop).rename(plan.set_aside)
    before = plan.checkpoint_folder(plan.checkpoint)
    (before.parent / "latest").write_text(f"{before.name}\n")


def write_resume_check(plan: Plan) -> None:
    checked = check_resume(
        plan.run_dir / "metrics.jsonl",
        plan.set_aside,
        plan.checkpoint_folder(plan.stop),
        resumed_from=plan.checkpoint,
        stop=plan.stop,
    )
    (plan.out / "resume.json").write_text(json.dumps(checked.to_json(), indent=1) + "\n")
    print(
        f"steps {plan.checkpoint + 1} to {plan.stop} were trained twice: sample keys, losses, weights and Adam's "
        f"moments are {'equal bit for bit' if checked.exact else 'NOT equal, see ' + str(plan.out / 'resume.json')}"
    )


def start_anew(out: Path) -> None:
    """Remove what an earlier demo left, corpora excepted. UserError if it is in use, or not a demo's."""
    if (out / "run").exists():
        if not (out / "stages.json").exists():
            raise UserError(f"{out / 'run'} was not made by this command: move it away or choose another --out")
        run_folder.claim(out / "run").close()
    for path in (out / name for name in REMOVED_AT_START):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "stages.json").write_text("{}\n")


def figure_table(figures: dict[str, Any]) -> str:
    """Each figure beside the best constant guess and chance."""
    group = figures["retrieval_group"]
    rows = {
        "caption attributes (colour, shape, place)": figures["attributes"]["all"],
        "captions exact": figures["exact"],
        f"text-to-image retrieval@1 of {group}": figures["retrieval"],
    }
    lines = [f"{figures['num_scenes']} held-out scenes".ljust(44) + "this Emu   constant guess   chance"]
    for title, score in rows.items():
        lines.append(f"{title:<44}{score['model']:8.2f}   {score['constant']:14.2f}   {score['chance']:6.2f}")
    return "\n".join(lines)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def demo(out: Path, keep: bool, extra: list[str]) -> int:
    plan = make_plan(out, extra)
    if not (keep and (out / "stages.json").exists()):
        start_anew(out)
    run_stages(plan, keep)
    figures = read_json(out / "predictions/figures.json")["heldout"]
    exact = read_json(out / "resume.json")["exact"]
    print(f"\n{figure_table(figures)}\n")
    print(f"demo: {summary(figures)}, resume exact {'yes' if exact else 'no'}, report {out / 'report.html'}")
    return 0 if exact else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.run", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for everything (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help="do not train again what an earlier demo trained there")
    parser.add_argument("overrides", nargs="*", help="hydra overrides of the training, after --")
    arguments = parser.parse_args()
    return demo(arguments.out, arguments.keep, arguments.overrides)


if __name__ == "__main__":
    run_cli(main)
