"""EVA-CLIP's published file layout, for the vision tower: read and written.

Files hold either the tower alone or a whole CLIP model with the tower under `visual.`; the text tower, the tower's own
final `norm` and its `head` have no place in Emu. `ln_visual` is Emu's own and keeps its start.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save_file

from conf import UserError
from models.vision_encoder import VisionEncoder
from models.weights.tensor_files import StoredTensor, open_tensors

PREFIX = "visual."
NOT_IN_EMU = re.compile(r"(norm|head)\.")
TEXT_TOWER = re.compile(
    r"(text\.|transformer\.|token_embedding\.|ln_final\.)|(positional_embedding|text_projection|logit_scale)$"
)
OWN = "ln_visual."


def open_tower(path: Path) -> tuple[dict[str, StoredTensor], str]:
    """The tower's tensors in an EVA-CLIP file, and any that are unknown; what the tower's names there begin with."""
    tensors = open_tensors(path)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    tower = {
        name: tensor
        for name, tensor in tensors.items()
        if not NOT_IN_EMU.match(name.removeprefix(prefix)) and not (prefix and TEXT_TOWER.match(name))
    }
    return tower, prefix


def load_vision_encoder(encoder: VisionEncoder, path: str) -> None:
    """Copy the tower of an EVA-CLIP checkpoint into `encoder`. UserError lists missing, unknown or misshapen keys."""
    tower, prefix = open_tower(Path(path))
    own = {name: tuple(value.shape) for name, value in encoder.state_dict().items() if not name.startswith(OWN)}
    wanted = {prefix + name: shape for name, shape in own.items()}
    missing = sorted(wanted.keys() - tower.keys())
    unknown = sorted(tower.keys() - wanted.keys())
    misshapen = [
        f"{name} {tower[name].shape} for {shape}"
        for name, shape in wanted.items()
        if name in tower and tower[name].shape != shape
    ]
    if missing or unknown or misshapen:
        raise UserError(
            f"init.vision_encoder={path} does not fit model.vision (missing {missing[:4]}, unknown {unknown[:4]}, "
            f"other shapes {misshapen[:4]}): give the checkpoint of a tower of the same sizes"
        )
    encoder.load_state_dict({name: tower[prefix + name].load() for name in own}, strict=False)


def save_vision_encoder(encoder: VisionEncoder, path: Path) -> None:
    """Write the tower in the published layout (safetensors), keys under `visual.`."""
    tower = {PREFIX + name: value.contiguous() for name, value in encoder.state_dict().items() if OWN not in name}
    save_file(tower, path)
