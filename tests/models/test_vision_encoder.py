"""VisionEncoder against EVA-01-CLIP's arithmetic written out head by head in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.config import VisionConfig
from models.vision_encoder import VisionEncoder, normalise_pixels

WIDTH, HEADS, LAYERS, MLP_WIDTH, EPS = 24, 3, 2, 40, 1e-6


def encoder(image_size: int = 224, patch_size: int = 14) -> VisionEncoder:
    """All weights, norms and biases too, drawn wide enough to matter."""
    model = VisionEncoder(image_size, patch_size, WIDTH, LAYERS, HEADS, MLP_WIDTH, EPS).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if name.endswith(("norm1.weight", "norm2.weight")) else 0.0, std=0.2)
    return model


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + EPS).sqrt() * weight + bias


def patches(pixels: Tensor, patch_size: int) -> Tensor:
    """[3, H, W] -> [patches, 3 * patch_size^2], row by row."""
    side = pixels.shape[1] // patch_size
    cut = [
        pixels[:, y * patch_size : (y + 1) * patch_size, x * patch_size : (x + 1) * patch_size].flatten()
        for y in range(side)
        for x in range(side)
    ]
    return torch.stack(cut)


def attention(x: Tensor, state: dict[str, Tensor], block: str) -> Tensor:
    """Query, key and value weights are stacked in this order; the key has no bias."""
    q_weight, k_weight, v_weight = state[block + "attn.qkv.weight"].split(WIDTH)
    q = x @ q_weight.t() + state[block + "attn.q_bias"]
    k = x @ k_weight.t()
    v = x @ v_weight.t() + state[block + "attn.v_bias"]
    head_width = WIDTH // HEADS
    mixed = []
    for head in range(HEADS):
        part = slice(head * head_width, (head + 1) * head_width)
        weights = torch.exp(q[:, part] @ k[:, part].t() / math.sqrt(head_width))
        mixed.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, part])
    return torch.cat(mixed, dim=1) @ state[block + "attn.proj.weight"].t() + state[block + "attn.proj.bias"]


def mlp(x: Tensor, state: dict[str, Tensor], block: str) -> Tensor:
    hidden = x @ state[block + "mlp.fc1.weight"].t() + state[block + "mlp.fc1.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ state[block + "mlp.fc2.weight"].t() + state[block + "mlp.fc2.bias"]


def plain_encoder(pixels: Tensor, state: dict[str, Tensor], patch_size: int) -> Tensor:
    """One image [3, H, W] -> [1 + patches, WIDTH]."""
    x = patches(pixels, patch_size) @ state["patch_embed.proj.weight"].flatten(1).t() + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"][0], x]) + state["pos_embed"][0]
    for number in range(LAYERS):
        block = f"blocks.{number}."
        x = x + attention(layer_norm(x, state[block + "norm1.weight"], state[block + "norm1.bias"]), state, block)
        x = x + mlp(layer_norm(x, state[block + "norm2.weight"], state[block + "norm2.bias"]), state, block)
    return layer_norm(x, state["ln_visual.weight"], state["ln_visual.bias"])


@pytest.mark.parametrize(("image_size", "patch_size", "num_tokens"), [(224, 14, 257), (12, 4, 10)])
def test_equals_plain_arithmetic(image_size: int, patch_size: int, num_tokens: int) -> None:
    """All tokens, the class token first, within 1e-10 in float64."""
    model = encoder(image_size, patch_size)
    pixels = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    with torch.no_grad():
        actual = model(pixels)
        expected = torch.stack([plain_encoder(image, model.state_dict(), patch_size) for image in pixels])
    assert actual.shape == (2, num_tokens, WIDTH)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_only_the_published_weights_and_ln_visual() -> None:
    """The tower's own final norm and head do not exist; the key has no bias."""
    names = {name for name in encoder(12, 4).state_dict() if not name.startswith("blocks.1.")}
    block = {"attn.q_bias", "attn.v_bias", "attn.qkv.weight"} | {
        f"{module}.{kind}"
        for module in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    assert names == {f"blocks.0.{name}" for name in block} | {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "ln_visual.weight",
        "ln_visual.bias",
    }


def test_normalise_pixels() -> None:
    """(x / 255 - mean) / std with OpenAI CLIP's constants, within 1e-5 of float64 (values reach 2.2)."""
    config = VisionConfig()
    images = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    images[0, :, 0, 0], images[0, :, 0, 1] = 0, 255
    actual = normalise_pixels(images, config.pixel_mean, config.pixel_std, torch.float32)
    for channel, (mean, std) in enumerate(
        [(0.48145466, 0.26862954), (0.4578275, 0.26130258), (0.40821073, 0.27577711)]
    ):
        expected = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(actual[:, channel].double(), expected, rtol=0, atol=1e-5)
    assert normalise_pixels(images, config.pixel_mean, config.pixel_std, torch.bfloat16).dtype == torch.bfloat16
