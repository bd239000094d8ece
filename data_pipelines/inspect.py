"""Look at the data before a run: ``python -m data_pipelines.inspect COMMAND [overrides of a training job]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from conf import run_cli
from data_pipelines.config import training_sources
from data_pipelines.inspecting.bench import advice, measure
from data_pipelines.inspecting.display import show_info, show_lint, show_speed
from data_pipelines.inspecting.info import mixture_info, source_info
from data_pipelines.inspecting.lint import lint_source
from data_pipelines.inspecting.preview import make_preview
from data_pipelines.inspecting.settings import Settings, load_settings, open_all

EPILOG = """\
Overrides are those of a training job: data=demo model=emu_tiny, +experiment=demo, data.num_workers=8,
data.sources.laion.weight=0 (leaves a source out). Indexes that do not exist yet are built."""
LINT = """\
Read the samples of every source as training does, decode the pictures of some, and list what is broken.
Exit code 1 when something would stop training or is missing from a damaged shard (marked "broken"); 0 when
samples are only skipped or masked, which training does by itself and counts, or a file beside a shard counts other
samples than the shard holds (marked "remark")."""
INFO = """\
Count samples, shards and bytes, draw histograms of tokens, images, sizes and aspect ratios of a part of the samples,
and compare the mixture that is configured with what the first rows hold."""
PREVIEW = """\
Write preview.html, which needs nothing but itself, and preview.png: the first packed rows of a run, which position
belongs to which document, where pictures stand, and what is learnt where."""
BENCH = """\
Time the configured pipeline on this machine: rows, images and tokens a second, the stages of each source one by one,
the memory of each worker, and whether it feeds the GPUs."""

Command = Callable[[Settings, argparse.Namespace], int]


def main() -> int:
    arguments = make_parser().parse_args()
    return arguments.run(load_settings(arguments.overrides, arguments.config), arguments)


def run_lint(settings: Settings, arguments: argparse.Namespace) -> int:
    findings = {
        name: lint_source(name, settings.data, arguments.samples, arguments.decode)
        for name in training_sources(settings.data)
    }
    broken = [name for name, found in findings.items() if found.broken]
    if arguments.json:
        print_json(findings)
        return bool(broken)
    show_lint(findings, make_console())
    num_samples = sum(found.num_samples for found in findings.values())
    print(f"looked at {num_samples:,} samples of {len(findings)} sources: {len(broken)} sources are broken")
    mend = "restore or download again the shards that are named, then build their index again"
    print(f"next: {mend if broken else 'python -m data_pipelines.inspect info, with the same overrides'}")
    return bool(broken)


def run_info(settings: Settings, arguments: argparse.Namespace) -> int:
    opened = open_all(settings)
    sources = {reader.name: source_info(reader, opened, arguments.samples) for reader in opened.readers()}
    mixture = mixture_info(opened, arguments.rows)
    if arguments.json:
        print_json({"sources": sources, "mixture": mixture})
        return 0
    show_info(sources, mixture, make_console())
    num_samples = sum(info.num_samples for info in sources.values())
    print(f"{num_samples:,} samples in {len(sources)} sources")
    print("next: python -m data_pipelines.inspect preview, with the same overrides")
    return 0


def run_preview(settings: Settings, arguments: argparse.Namespace) -> int:
    preview = make_preview(open_all(settings), arguments.rows, arguments.out)
    megabytes = preview.page.stat().st_size / 2**20
    print(f"{len(preview.rows)} packed rows: {preview.page} ({megabytes:.1f} MB) and {preview.picture}")
    print(
        f"next: open {preview.page} in a browser, then python -m data_pipelines.inspect bench, with the same overrides"
    )
    return 0


def run_bench(settings: Settings, arguments: argparse.Namespace) -> int:
    speed = measure(open_all(settings), arguments.rows)
    hint = advice(speed, arguments.gpus, arguments.tokens_per_s)
    if arguments.json:
        rates = {f"{name}_per_s": getattr(speed, f"{name}_per_s") for name in ("rows", "images", "tokens")}
        print_json({**vars(speed), **rates, "advice": hint})
        return 0
    show_speed(speed, make_console())
    print(hint)
    print("next: python -m trainer.pretrain, with the same overrides")
    return 0


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


def print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=1, default=vars))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.inspect",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lint = add_command(commands, "lint", "what is broken", LINT, run_lint)
    add_number(lint, "--samples", None, "look at about N of each source, evenly spread (all)")
    lint.add_argument(
        "--decode",
        type=number_or_all,
        default=100,
        metavar="N",
        help="decode the pictures of about N of them, or 'all' (%(default)s)",
    )
    info = add_command(commands, "info", "counts, histograms and mixture", INFO, run_info)
    add_number(info, "--samples", 2000, "read about N of each source for the histograms")
    add_number(info, "--rows", 1000, "rows for the mixture")
    preview = add_command(commands, "preview", "a page of packed rows", PREVIEW, run_preview)
    add_number(preview, "--rows", 6, "rows to show")
    preview.add_argument("--out", type=Path, default=Path("outputs/preview"), help="folder to write (%(default)s)")
    bench = add_command(commands, "bench", "how fast rows come", BENCH, run_bench)
    add_number(bench, "--rows", 256, "rows to time")
    add_number(bench, "--gpus", 8, "GPUs to feed")
    add_number(bench, "--tokens-per-s", 4000, "tokens a second that each GPU takes")
    for command in (lint, info, bench):
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def add_command(commands: Any, name: str, purpose: str, description: str, run: Command) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=purpose,
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of a training job, as below")
    command.add_argument("--config", type=Path, metavar="FILE", help="start from a run's config.yaml, not from conf/")
    command.set_defaults(run=run)
    return command


def add_number(command: argparse.ArgumentParser, name: str, default: int | None, purpose: str) -> None:
    purpose += " (%(default)s)" if default is not None else ""
    command.add_argument(name, type=positive, default=default, metavar="N", help=purpose)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def number_or_all(text: str) -> int | None:
    """None = all."""
    if text == "all":
        return None
    return 0 if text == "0" else positive(text)


if __name__ == "__main__":
    run_cli(main)
