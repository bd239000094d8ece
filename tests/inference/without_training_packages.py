"""Run a module of the current folder as `python -m` does, while the packages of training cannot be imported."""

from __future__ import annotations

import runpy
import sys
from typing import Any

REFUSED = {"deepspeed", "megatron", "webdataset", "hydra", "omegaconf", "wandb", "decord", "av", "fsspec"}
REFUSED |= {"conf", "data_pipelines", "models", "trainer", "launch", "inference", "benchmarks", "tests"}


class Without:
    """A finder that does not find what is refused, as if it were not installed."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, *args: Any) -> Any:
        return None if name.partition(".")[0] in REFUSED else self.finder.find_spec(name, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


if __name__ == "__main__":
    module, *arguments = sys.argv[1:]
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    sys.path[0] = ""
    sys.argv[:] = [module, *arguments]
    assert not REFUSED & {name.partition(".")[0] for name in sys.modules}
    runpy.run_module(module, run_name="__main__", alter_sys=True)
