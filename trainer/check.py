"""Check a training command line before any process starts, in a second, without torch: `python -m trainer.check`."""

from __future__ import annotations

import os
import sys

from conf import run_cli
from data_pipelines.sources import make_source
from trainer.config import compose_config, fill_vocabulary
from trainer.config_checks import data_parallel_size, validate


def check(arguments: list[str]) -> None:
    """UserError for what `python -m trainer.pretrain` could not run on WORLD_SIZE ranks (if unset, on the fewest)."""
    config = compose_config([argument for argument in arguments if not argument.startswith("-")])
    num_procs = int(os.environ.get("WORLD_SIZE", "0")) or config.parallel.tensor
    validate(config, data_parallel_size(config.parallel.tensor, num_procs))
    for name, source in config.data.sources.items():
        make_source(name, source, config.data)
    fill_vocabulary(config)


if __name__ == "__main__":
    run_cli(lambda: check(sys.argv[1:]))
