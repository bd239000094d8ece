"""Everything that a page tells of a run, read from its folder, and read on while the run goes on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf import UserError
from trainer.reporting.events import Events
from trainer.reporting.history import History

SPEED_STEPS = 50
"""Speeds are means over so many of the last steps."""
SILENT_STEPS, SILENT_S = 20, 600.0
"""A run that has not written for so many of its steps, and for so long, has been killed or hangs."""


@dataclass(frozen=True)
class Ending:
    code: int
    reason: str


class RunRecord:
    """UserError if the folder is not a run's. `read` again brings it up to date."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        if not (run_dir / "config.yaml").is_file():
            raise UserError(f"{run_dir} is not a run folder, it has no config.yaml: give the run_dir of a run")
        self.metrics = History(run_dir / "metrics.jsonl")
        self.validation = History(run_dir / "validation.jsonl", prefix="validation/")
        self.events = Events(run_dir / "events.jsonl")
        self.ending: Ending | None = None

    def read(self) -> None:
        """The ending first: what is read after it is all that there will be."""
        self.ending = read_ending(self.run_dir)
        self.config_text = (self.run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
        self.config = parse_config(self.run_dir / "config.yaml", self.config_text)
        for part in (self.metrics, self.validation, self.events):
            part.read_new()

    def setting(self, key: str) -> Any:
        """By its dotted name; None if this run's version does not know it."""
        return OmegaConf.select(self.config, key)

    def history(self, metric: str) -> History:
        return self.validation if metric.startswith("validation/") else self.metrics

    @property
    def weights(self) -> dict[str, float]:
        """Share of the documents that the configuration asks of each source."""
        sources = self.setting("data.sources") or {}
        weights = {name: float(source.get("weight", 1.0)) for name, source in sources.items()}
        total = sum(weights.values()) or 1.0
        return {name: weight / total for name, weight in weights.items()}

    @property
    def step(self) -> int:
        """Where the newest attempt is."""
        begun = self.events.last.get("start", (0, {"step": 0}))[1]["step"]
        return begun if self.metrics.step is None else self.metrics.step

    def seconds_per_step(self) -> float | None:
        return self.metrics.seconds_per_step() or self.metrics.recent("seconds/step", SPEED_STEPS)

    def silent_seconds(self) -> float | None:
        """Since the last step, where that is far too long; None while the run writes, and after its end."""
        path = self.run_dir / "metrics.jsonl"
        if self.ending is not None or not path.exists():
            return None
        silent = time.time() - (self.metrics.last_time or path.stat().st_mtime)
        return silent if silent > max(SILENT_S, SILENT_STEPS * (self.seconds_per_step() or 0.0)) else None

    def checkpoint(self) -> tuple[str, float] | None:
        """Name of the newest whole checkpoint, and the Unix time of it."""
        latest = self.run_dir / "checkpoints" / "latest"
        if not latest.is_file():
            return None
        return latest.read_text(encoding="utf-8", errors="replace").strip(), latest.stat().st_mtime


def read_ending(run_dir: Path) -> Ending | None:
    """None while the run goes on; so too while exit.json is being written."""
    try:
        content = json.loads((run_dir / "exit.json").read_text(encoding="utf-8"))
        return Ending(int(content["code"]), str(content["reason"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def parse_config(path: Path, text: str) -> DictConfig:
    """UserError for what no run has written there."""
    try:
        config = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as a configuration: give the run_dir of a run") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} holds a list: give the run_dir of a run")
    return config
