"""EVA-01-CLIP vision tower as Emu uses it (pure torch; export copies this file into the inference package).

Shapes: M images, P = 1 + (image_size / patch_size)^2 tokens, W width. Parameter names are those of the published
EVA-CLIP files. Differences from CLIP's tower: query and value biases but no key bias, every token is an output, the
tower's own final norm and head do not exist; a LayerNorm of Emu's (`ln_visual`) stands there instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02
"""EVA's own start: normal of this everywhere, residual outputs shrunk by depth."""


def _draw(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std)


def normalise_pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 [M, 3, H, W] -> [M, 3, H, W] in `dtype`, (x / 255 - mean) / std per channel."""
    scale = torch.tensor([255.0 * s for s in std], device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, 3, 1, 1)
    return (images.float() / scale - shift).to(dtype)


class Linear(nn.Linear):
    """Starts normal of `std`, biases 0; drawn where nn.Linear's constructor does, for ZeRO-3 splits the parameters of a
    module over the ranks as soon as it is constructed."""

    def __init__(self, in_width: int, out_width: int, std: float, bias: bool = True) -> None:
        self.std = std
        super().__init__(in_width, out_width, bias)

    def reset_parameters(self) -> None:
        _draw(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class VisionAttention(nn.Module):
    """Bidirectional self-attention, [M, P, W] -> [M, P, W]."""

    def __init__(self, width: int, num_heads: int, residual_std: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, INIT_STD, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = (self.qkv(x) + bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    def __init__(self, width: int, hidden: int, residual_std: float) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, INIT_STD)
        self.fc2 = Linear(hidden, width, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """Block `depth` of the tower, from 1 on: what it adds to the residual stream starts the smaller, the deeper."""

    def __init__(self, depth: int, width: int, num_heads: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        residual_std = INIT_STD / (2 * depth) ** 0.5
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = VisionAttention(width, num_heads, residual_std)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = VisionMlp(width, mlp_width, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchProjection(nn.Conv2d):
    def reset_parameters(self) -> None:
        _draw(self.weight, INIT_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PatchEmbedding(nn.Module):
    """[M, 3, H, W] -> [M, patches, width], patches in row-major order."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """Normalised pixels [M, 3, H, W] -> [M, P, W]: all tokens of the last block, class token first, normed.

    With `recompute` a block keeps its input alone for the backward pass and is computed again there.
    """

    recompute = False

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        num_tokens = 1 + (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbedding(patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, width))
        self.blocks = nn.ModuleList(
            VisionBlock(depth, width, num_heads, mlp_width, norm_eps) for depth in range(1, num_layers + 1)
        )
        self.ln_visual = nn.LayerNorm(width, eps=norm_eps)
        _draw(self.cls_token, INIT_STD)
        _draw(self.pos_embed, INIT_STD)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.ln_visual(x)
