"""One page that shows how a run goes: ``python -m trainer.report RUN``; ``--watch 60`` keeps it up to date.

Everything is read from the run folder, on any machine that sees it; the page needs nothing but itself.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from conf import UserError, run_cli
from trainer.reporting.page import render
from trainer.reporting.run_record import RunRecord
from trainer.stop import START_AGAIN, STOPPED_BY_SIGNAL


def write_report(run: RunRecord, path: Path, refresh_s: float | None = None) -> None:
    """Bring `run` up to date and replace the page at once: whoever reads it sees a whole one.

    refresh_s: while the run goes on, the page loads itself again after so long; None = never.
    """
    run.read()
    page = render(run, None if has_ended(run) else refresh_s)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def has_ended(run: RunRecord) -> bool:
    """For good: not by something after which it is started again."""
    return run.ending is not None and run.ending.code not in (STOPPED_BY_SIGNAL, START_AGAIN)


def watch(run: RunRecord, path: Path, every_s: float) -> None:
    """Write the page again and again until the run has ended for good, not to be started again."""
    write_report(run, path, every_s)
    while not has_ended(run):
        time.sleep(every_s)
        write_report(run, path, every_s)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (RUN/report.html)")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="write it again so often until the run has ended for good"
    )
    arguments = parser.parse_args()
    path = arguments.out or arguments.run / "report.html"
    run = RunRecord(arguments.run)
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}, make it first")
    if arguments.watch is None:
        write_report(run, path)
    elif arguments.watch > 0:
        print(f"report: {path}, again every {arguments.watch:g} s until the run has ended", flush=True)
        watch(run, path, arguments.watch)
    else:
        raise UserError(f"--watch {arguments.watch:g} is too short: give seconds, as in --watch 60")
    size = path.stat().st_size / 2**20
    print(f"report: {path} ({size:.1f} MB), step {run.step:,}; next: open it in a browser")


if __name__ == "__main__":
    run_cli(main)
