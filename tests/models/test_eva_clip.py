"""Reading and writing the vision tower in EVA-CLIP's layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf import UserError
from models.vision_encoder import VisionEncoder
from models.weights.eva_clip import load_vision_encoder, save_vision_encoder


def encoder() -> VisionEncoder:
    """Every weight is drawn anew at every call, biases and `ln_visual` too."""
    model = VisionEncoder(image_size=8, patch_size=4, width=16, num_layers=2, num_heads=2, mlp_width=24, norm_eps=1e-6)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def tower(model: VisionEncoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("ln_visual.")}


def whole_clip(model: VisionEncoder) -> dict[str, Tensor]:
    """A CLIP file as EVA-CLIP publishes them: towers for text and images, the latter with its own norm and head."""
    return {f"visual.{name}": value for name, value in tower(model).items()} | {
        "logit_scale": torch.tensor(4.6),
        "visual.norm.weight": torch.randn(16),
        "visual.norm.bias": torch.randn(16),
        "visual.head.weight": torch.randn(10, 16),
        "visual.head.bias": torch.randn(10),
        "text.token_embedding.weight": torch.randn(30, 12),
        "text.transformer.resblocks.0.attn.in_proj_weight": torch.randn(36, 12),
    }


def assert_holds(model: VisionEncoder, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_save_then_load_is_bit_exact_and_keeps_ln_visual(tmp_path: Path) -> None:
    source, target = encoder(), encoder()
    own = target.ln_visual.weight.clone(), target.ln_visual.bias.clone()
    save_vision_encoder(source, tmp_path / "tower.safetensors")
    load_vision_encoder(target, str(tmp_path / "tower.safetensors"))
    assert_holds(target, tower(source))
    assert torch.equal(target.ln_visual.weight, own[0]) and torch.equal(target.ln_visual.bias, own[1])


def test_the_file_has_the_published_names(tmp_path: Path) -> None:
    save_vision_encoder(encoder(), tmp_path / "tower.safetensors")
    names = load_file(tmp_path / "tower.safetensors").keys()
    assert {"visual.cls_token", "visual.pos_embed", "visual.patch_embed.proj.weight"} < names
    assert {"visual.blocks.1.attn.qkv.weight", "visual.blocks.1.attn.q_bias", "visual.blocks.1.mlp.fc1.bias"} < names
    assert all(name.startswith("visual.") and "ln_visual" not in name for name in names)


@pytest.mark.parametrize("wrapper", [None, "module", "state_dict", "model"])
def test_whole_clip_as_pt(wrapper: str | None, tmp_path: Path) -> None:
    source, target = encoder(), encoder()
    state = whole_clip(source)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "clip.pt")
    load_vision_encoder(target, str(tmp_path / "clip.pt"))
    assert_holds(target, tower(source))


def test_tower_alone_without_prefix(tmp_path: Path) -> None:
    source, target = encoder(), encoder()
    save_file(tower(source) | {"head.weight": torch.randn(10, 16)}, tmp_path / "tower.safetensors")
    load_vision_encoder(target, str(tmp_path / "tower.safetensors"))
    assert_holds(target, tower(source))


def test_half_precision_file_becomes_fp32(tmp_path: Path) -> None:
    source, target = encoder(), encoder()
    torch.save({name: value.half() for name, value in whole_clip(source).items()}, tmp_path / "clip.pt")
    load_vision_encoder(target, str(tmp_path / "clip.pt"))
    assert_holds(target, {name: value.half().float() for name, value in tower(source).items()})
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("missing", "extra", "named"),
    [
        ("visual.blocks.1.mlp.fc2.bias", None, ["missing ['visual.blocks.1.mlp.fc2.bias']", "unknown []"]),
        (
            "visual.blocks.0.attn.q_bias",
            ("visual.blocks.0.attn.query_bias", torch.zeros(16)),
            ["missing ['visual.blocks.0.attn.q_bias']", "unknown ['visual.blocks.0.attn.query_bias']"],
        ),
        (
            None,
            ("visual.blocks.2.norm1.weight", torch.zeros(16)),
            ["missing []", "unknown ['visual.blocks.2.norm1.weight']"],
        ),
        (
            "visual.pos_embed",
            ("pos_embed", torch.zeros(1, 5, 16)),
            ["missing ['visual.pos_embed']", "unknown ['pos_embed']"],
        ),
        (
            "visual.pos_embed",
            ("visual.pos_embed", torch.zeros(1, 17, 16)),
            ["missing []", "visual.pos_embed (1, 17, 16) for (1, 5, 16)"],
        ),
    ],
    ids=["missing", "misspelt", "deeper tower", "without prefix", "other shape"],
)
def test_unfitting_keys_are_named_and_nothing_is_loaded(
    missing: str | None, extra: tuple[str, Tensor] | None, named: list[str], tmp_path: Path
) -> None:
    target = encoder()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = whole_clip(encoder())
    state.pop(missing, None)
    state |= dict([extra]) if extra else {}
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(UserError) as error:
        load_vision_encoder(target, str(tmp_path / "clip.safetensors"))
    assert all(words in str(error.value) for words in [*named, "clip.safetensors"]), error.value
    assert_holds(target, before)


class Intruder:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pt_file_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": whole_clip(encoder()), "extra": Intruder(tmp_path / "ran")}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"clip\.pt cannot be read"):
        load_vision_encoder(encoder(), str(tmp_path / "clip.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt"])
@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b"PK\x03\x04 half a download"])
def test_an_unreadable_file_is_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_vision_encoder(encoder(), str(tmp_path / name))
