"""Which data and how they are packed: from the overrides of a training job, or from the folder of one that ran."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import UserError
from conf.composing import compose_object, one_sentence
from data_pipelines.config import DataConfig
from data_pipelines.index import Index
from data_pipelines.loader import open_indexes
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.validate import validate_batching

OF_THE_TRAINER = (
    *("run_dir", "total_steps", "stop_after_step", "stop_after_minutes", "seed", "objective", "optim", "parallel"),
    *("checkpoint", "guard", "monitor", "validation", "init"),
)
"""Settings of a training job that change nothing about its data."""


@dataclass(frozen=True)
class Settings:
    """num_queries: embeddings of a picture, which decide how many positions it takes; image_size: in pixels."""

    data: DataConfig
    num_queries: int
    image_size: int


def load_settings(overrides: list[str], run_config: Path | None) -> Settings:
    """Compose `conf/inspect.yaml`, or read a run's config.yaml and override it. Raises UserError."""
    composed = read_run_config(run_config, overrides) if run_config else compose_for_inspection(overrides)
    model = composed["model"]
    settings = Settings(
        composed["data"], model["causal_transformer"]["num_queries"], model["vision"]["image_size"]
    )  # fmt: skip
    validate_batching(settings.data, 1, settings.num_queries)
    return settings


def compose_for_inspection(overrides: list[str]) -> dict[str, Any]:
    """Only the data are typed: what else a job overrides is another package's to check."""
    ConfigStore.instance().store(name="inspect_schema", node={"data": DataConfig})
    return compose_object("inspect", [override for override in overrides if _head(override) not in OF_THE_TRAINER])


def _head(override: str) -> str:
    """What a key begins with: group or section."""
    return re.split(r"[.=@/]", override.lstrip("+~"), maxsplit=1)[0]


def read_run_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    try:
        saved = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _no_run(path) from error
    if not isinstance(saved, DictConfig) or not {"data", "model"} <= saved.keys():
        raise _no_run(path)
    schema = OmegaConf.create({"data": DataConfig})
    overrides = [override for override in overrides if _head(override) not in OF_THE_TRAINER]
    try:
        parts = ({name: saved[name]} for name in ("data", "model"))
        return OmegaConf.to_object(OmegaConf.merge(schema, *parts, OmegaConf.from_dotlist(overrides)))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(one_sentence(error)) from error


def _no_run(path: Path) -> UserError:
    return UserError(f"{path} is no configuration of a run: give the config.yaml of its run folder")


@dataclass(frozen=True)
class Opened:
    """Settings with everything that they name opened: indexes in the order of the source numbers."""

    settings: Settings
    indexes: dict[str, Index]
    tokenizer: Tokenizer

    def readers(self) -> list[SourceReader]:
        return [SourceReader(name, self.settings.data, index) for name, index in self.indexes.items()]


def open_all(settings: Settings) -> Opened:
    """Indexes that do not exist yet are built. Raises UserError for what cannot be opened."""
    tokenizer = Tokenizer(settings.data.tokenizer)
    return Opened(settings, open_indexes(settings.data, build_missing=True), tokenizer)


def spread(total: int, wanted: int) -> Iterator[int]:
    """At most `wanted` numbers of range(total), evenly spread."""
    count = min(total, wanted)
    return (i * total // count for i in range(count))
