"""Composing the YAML groups of this folder with Hydra, and saying in one sentence why they do not compose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from conf import UserError

CONF_DIR = str(Path(__file__).resolve().parent)
NOISE = ("full_key:", "object_type=", "reference_type=", "Config search path", "provider=", "^", "See https://")
"""Lines of Hydra's messages that tell a user nothing."""


def compose_object(name: str, overrides: list[str]) -> Any:
    """`conf/<name>.yaml` with command-line overrides, as dataclasses. UserError on an unknown key or a wrong type."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
            return OmegaConf.to_object(compose(config_name=name, overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_sentence(error)) from error


def one_sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's messages in a line, with the key where they know it, and how to mend it."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    variable = re.search(r"Environment variable '(\w+)' not found", str(cause))
    if variable:
        name = variable[1]
        return f"{key} needs the environment variable {name}, which is not set: export {name}=FOLDER, or override {key}"
    if isinstance(cause, ConfigKeyError) and "is not in struct" in str(cause):
        return f"{key} does not exist yet: check its name, or put a + before it to add it"
    lines = [line.strip() for line in str(cause).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(NOISE))
    where = f" at {key}" if key and key not in text else ""
    return f"{text.rstrip('.')}{where}: see all keys and their values with python -m trainer.pretrain --cfg job"
