"""EVA-01-CLIP vision tower as Emu uses it (pure torch; export copies this file into the inference package).

Shapes: M images, P = 1 + (image_size / patch_size)^2 tokens, W width. Parameter names are those of the published
EVA-CLIP files. Differences from CLIP's tower: query and value biases but no key bias, every token is an output, the
tower's own final norm and head do not exist; a LayerNorm of Emu's (`ln_visual`) stands there instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalise_pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 [M, 3, H, W] -> [M, 3, H, W] in `dtype`, (x / 255 - mean) / std per channel."""
    scale = torch.tensor([255.0 * s for s in std], device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, 3, 1, 1)
    return (images.float() / scale - shift).to(dtype)


class VisionAttention(nn.Module):
    """Bidirectional self-attention, [M, P, W] -> [M, P, W]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = (self.qkv(x) + bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = VisionAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = VisionMlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """[M, 3, H, W] -> [M, patches, width], patches in row-major order."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """Normalised pixels [M, 3, H, W] -> [M, P, W]: all tokens of the last block, class token first, normed."""

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
        self.blocks = nn.ModuleList(VisionBlock(width, num_heads, mlp_width, norm_eps) for _ in range(num_layers))
        self.ln_visual = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """EVA's own start: normal of 0.02 everywhere, residual outputs shrunk by depth."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        with torch.no_grad():
            for depth, block in enumerate(self.blocks, start=1):
                assert isinstance(block, VisionBlock)
                block.attn.proj.weight.div_((2 * depth) ** 0.5)
                block.mlp.fc2.weight.div_((2 * depth) ** 0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.ln_visual(x)
