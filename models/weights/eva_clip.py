"""EVA-CLIP's published file layout, for the vision tower: read and written.

Files hold either the tower alone or a whole CLIP model with the tower under `visual.`; the text tower, the tower's own
final `norm` and its `head` have no place in Emu. `ln_visual` is Emu's own and keeps its start.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf import UserError
from models.vision_encoder import VisionEncoder

PREFIX = "visual."
NOT_IN_EMU = ("norm.", "head.")
OWN = "ln_visual."


def load_vision_encoder(encoder: VisionEncoder, path: str) -> None:
    """Copy the tower of an EVA-CLIP checkpoint into `encoder`. UserError lists missing, unknown or misshapen keys."""
    tower = _tower(_read(path))
    wanted = {name: value.shape for name, value in encoder.state_dict().items() if not name.startswith(OWN)}
    missing = sorted(wanted.keys() - tower.keys())
    unknown = sorted(tower.keys() - wanted.keys())
    misshapen = [
        f"{name} {tuple(tower[name].shape)} for {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tower and tower[name].shape != shape
    ]
    if missing or unknown or misshapen:
        raise UserError(
            f"init.vision_encoder={path} does not fit model.vision (missing {missing[:4]}, unknown {unknown[:4]}, "
            f"other shapes {misshapen[:4]}): give the checkpoint of a tower of the same sizes"
        )
    encoder.load_state_dict(tower, strict=False)


def save_vision_encoder(encoder: VisionEncoder, path: Path) -> None:
    """Write the tower in the published layout (safetensors), keys under `visual.`."""
    tower = {PREFIX + name: value.contiguous() for name, value in encoder.state_dict().items() if OWN not in name}
    save_file(tower, path)


def _read(path: str) -> dict[str, Tensor]:
    try:
        content = load_file(path) if path.endswith(".safetensors") else _read_pt(path)
    except (OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(
            f"init.vision_encoder={path} cannot be read as a checkpoint of nothing but tensors "
            f"({type(error).__name__}): download it again, or save its state_dict as .safetensors"
        ) from error
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _read_pt(path: str) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("module", "state_dict", "model"):
        content = content.get(wrapper, content)
    return content


def _tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(name.startswith(PREFIX) for name in state):
        state = {name[len(PREFIX) :]: value for name, value in state.items() if name.startswith(PREFIX)}
    return {name: value.float() for name, value in state.items() if not name.startswith(NOT_IN_EMU)}
