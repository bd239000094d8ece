"""Command ``python -m data_pipelines.prepare.index``: make the index of a corpus before a job needs it."""

from __future__ import annotations

import argparse

from conf import UserError, run_cli
from data_pipelines.index_builder import build_index


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.prepare.index", description=__doc__)
    parser.add_argument("name", help="name of the source, as under data.sources")
    parser.add_argument("pattern", help="path, glob or brace pattern of its tars, in quotes")
    parser.add_argument("--out", required=True, help="folder of the index")
    parser.add_argument("--chunk-samples", type=int, default=64, help="samples read at a time, at most (%(default)s)")
    parser.add_argument("--chunk-mb", type=float, default=4.0, help="MiB read at a time, at most (%(default)s)")
    arguments = parser.parse_args()
    if arguments.chunk_samples < 1 or arguments.chunk_mb <= 0:
        raise UserError("--chunk-samples and --chunk-mb must be positive: leave them out for 64 samples and 4 MiB")
    index = build_index(
        arguments.name,
        arguments.pattern,
        arguments.out,
        chunk_samples=arguments.chunk_samples,
        chunk_mb=arguments.chunk_mb,
    )
    damaged = f", {index.num_defects} defects listed in {index.path / 'defects.txt'}" if index.num_defects else ""
    print(
        f"indexed {index.num_samples} samples in {index.num_shards} shards ({index.num_chunks} chunks{damaged}): "
        f"{index.path}\nnext: train with data.sources.{arguments.name}.index={index.path}"
    )


if __name__ == "__main__":
    run_cli(main)
