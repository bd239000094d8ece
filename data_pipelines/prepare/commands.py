"""The command line that the preparing commands share: options, and the table at the end."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf import UserError
from data_pipelines.prepare.jobs import Report, Task


def make_parser(name: str, description: str | None, samples_per_shard: int | None) -> argparse.ArgumentParser:
    """Parser with the options of every command. samples_per_shard: the default, None = no bound."""
    parser = argparse.ArgumentParser(
        prog=f"python -m data_pipelines.prepare.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards; run again, it goes on there")
    default = "no bound" if samples_per_shard is None else samples_per_shard
    parser.add_argument(
        "--samples-per-shard", type=int, default=samples_per_shard, metavar="N", help=f"at most ({default})"
    )
    parser.add_argument("--task-id", type=int, default=0, metavar="I", help="this task of a job array, from 0 on")
    parser.add_argument("--num-tasks", type=int, default=1, metavar="N", help="tasks that share the work (%(default)s)")
    return parser


def read_task(arguments: argparse.Namespace) -> Task:
    """Checks the options that every command has."""
    task = Task(arguments.task_id, arguments.num_tasks)
    if not 0 <= task.id < task.num_tasks:
        raise UserError(
            f"--task-id {task.id} is none of the tasks of --num-tasks {task.num_tasks}: they are numbered from 0 on"
        )
    if arguments.samples_per_shard is not None and arguments.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {arguments.samples_per_shard} must be at least 1")
    return task


def print_report(report: Report, out: Path, kind: str, unit: str, task: Task) -> None:
    """Table of what was made and left out, and what to run next. Raises UserError when nothing could be used."""
    table = Table(title=f"{unit} of task {task.id} of {task.num_tasks}" if task.num_tasks > 1 else unit)
    table.add_column("what became of them")
    table.add_column("number", justify="right")
    left_out = {reason: number for reason, number in report.statuses.items() if reason != "success"}
    _add_rows(table, [("made into samples", report.num_samples)])
    _add_rows(table, [(f"left out: {reason}", number) for reason, number in sorted(left_out.items())])
    table.add_section()
    _add_rows(table, sorted(report.notes.items()))
    Console(width=100).print(table)
    print(
        f"{report.num_made} shards made, {report.num_kept} were there already "
        f"({report.nbytes / 2**20:.1f} MiB in all): {out}"
    )
    if left_out and not report.num_samples and task.num_tasks == 1:
        raise UserError(f"none of the {unit} could be used: the table says why")
    print(_next_steps(out, kind, task))


def _add_rows(table: Table, rows: Iterable[tuple[str, int]]) -> None:
    for label, number in rows:
        table.add_row(label, f"{number:,}")


def _next_steps(out: Path, kind: str, task: Task) -> str:
    when = f" (when all {task.num_tasks} tasks have ended)" if task.num_tasks > 1 else ""
    index = out / "index"
    return (
        f"next{when}: python -m data_pipelines.prepare.index {kind} '{out / '*.tar'}' --out {index}\n"
        f"then train with data.sources.{kind}.shards='{out / '*.tar'}' data.sources.{kind}.index={index}"
    )
