"""Command ``python -m data_pipelines.prepare.index``: make the index of a corpus before a job needs it.

Reads the tar headers of every shard, several shards at a time. A build that was stopped goes on where it was when the
same command is run again. For a corpus of many thousand shards run it as a job array with --task-id and --num-tasks,
then once without them: that call scans what is missing and writes the index.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex

from conf import UserError, run_cli
from data_pipelines.index import Index
from data_pipelines.index_builder import build_index, scan_share

MAX_LISTED_DEFECTS = 10


def main() -> None:
    arguments = _parser().parse_args()
    _check(arguments)
    given = {name: getattr(arguments, name) for name in ("chunk_samples", "chunk_mb", "workers")}
    corpus = (arguments.source, arguments.patterns, arguments.out)
    if arguments.task_id is None:
        _tell(build_index(*corpus, **given), arguments.source)
        return
    report = scan_share(*corpus, arguments.task_id, arguments.num_tasks, **given)
    print(
        f"task {arguments.task_id} of {arguments.num_tasks}: scanned {report.num_scanned} shards "
        f"({report.num_earlier} were scanned before): {arguments.out}.parts\n"
        f"next: when every task is done, {_command_without_tasks(arguments)}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.prepare.index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="name of the source, as under data.sources")
    parser.add_argument("patterns", nargs="+", help="its tars: paths, urls, globs or brace patterns, in quotes")
    parser.add_argument("--out", required=True, help="folder of the index")
    parser.add_argument("--chunk-samples", type=int, default=64, help="samples read at a time, at most (%(default)s)")
    parser.add_argument("--chunk-mb", type=float, default=4.0, help="MiB read at a time, at most (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; here %(default)s, one a core"
    )
    parser.add_argument("--task-id", type=int, help="scan only the share of this task of a job array, 0, 1, ...")
    parser.add_argument("--num-tasks", type=int, help="tasks of the job array")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.chunk_samples < 1 or arguments.chunk_mb <= 0:
        raise UserError("--chunk-samples and --chunk-mb must be positive: leave them out for 64 samples and 4 MiB")
    if arguments.workers < 1:
        raise UserError("--workers must be positive: leave it out for one a core")
    if (arguments.task_id is None) != (arguments.num_tasks is None):
        raise UserError("--task-id and --num-tasks belong together: give both to scan a share, none to write the index")
    if arguments.task_id is not None and not 0 <= arguments.task_id < arguments.num_tasks:
        raise UserError(
            f"--task-id {arguments.task_id} is not one of 0 to {arguments.num_tasks - 1}: "
            "start the job array at 0, or give a larger --num-tasks"
        )


def _command_without_tasks(arguments: argparse.Namespace) -> str:
    words = [arguments.source, *arguments.patterns, "--out", arguments.out]
    words += ["--chunk-samples", str(arguments.chunk_samples), "--chunk-mb", f"{arguments.chunk_mb:g}"]
    return f"run python -m data_pipelines.prepare.index {shlex.join(words)}"


def _tell(index: Index, source: str) -> None:
    print(
        f"indexed {index.num_samples} samples in {index.num_shards} shards ({index.num_chunks} chunks): {index.path}\n"
        f"  damages {index.num_defects}, counts beside shards that disagree {index.num_disagreements}"
    )
    defects = index.path / "defects.txt"
    with defects.open(encoding="utf-8", errors="replace") as lines:
        for line in itertools.islice(lines, MAX_LISTED_DEFECTS):
            print(f"  {line.rstrip()}")
    if index.num_defects + index.num_disagreements > MAX_LISTED_DEFECTS:
        print(f"  ... and more in {defects}")
    print(f"next: train with data.sources.{source}.index={index.path}")


if __name__ == "__main__":
    run_cli(main)
