"""Which kernel computes attention on a device, and how the variable-length flash kernels are called.

Shapes: T positions of n documents laid end to end, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from conf import UserError

FLASH_KERNELS = ("varlen", "flash_attn")
"""torch's own and that of the package flash-attn, in the order in which they are tried."""

WIDEST_HEAD = 192
"""Wider heads have no backward pass on some devices."""

VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""q [T, H, D], k and v [T, K, D], offsets int32 [n + 1], length of the longest document -> [T, H, D], causal."""


def attention_backend(wanted: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """`choose_backend` for this machine."""
    if wanted == "sdpa" or device.type != "cuda":
        return choose_backend(wanted, dtype, head_width, capability=None, installed=())
    installed = ["varlen"] if torch.backends.cuda.is_flash_attention_available() else []
    if find_spec("flash_attn"):
        installed.append("flash_attn")
    return choose_backend(wanted, dtype, head_width, torch.cuda.get_device_capability(device), installed)


def choose_backend(
    wanted: str,
    dtype: torch.dtype,
    head_width: int,
    capability: tuple[int, int] | None,
    installed: Collection[str],
) -> str:
    """sdpa, varlen or flash_attn. wanted: one of them, or auto for the fastest that can run.

    dtype: that of queries, keys and values. capability: of the CUDA device, None on others. installed: flash kernels.
    UserError where the wanted one cannot run.
    """
    obstacle = _flash_obstacle(dtype, head_width, capability)
    usable = [name for name in FLASH_KERNELS if name in installed and not obstacle]
    if wanted == "auto":
        return [*usable, "sdpa"][0]
    if wanted not in ("sdpa", *usable):
        raise UserError(
            f"model.language_model.attention={wanted} cannot run here ({obstacle or 'it is not installed'}): "
            "choose auto or sdpa"
        )
    return wanted


def _flash_obstacle(dtype: torch.dtype, head_width: int, capability: tuple[int, int] | None) -> str:
    """Why flash kernels cannot run, "" where they can."""
    if capability is None:
        return "it needs a CUDA device"
    if capability < (8, 0):
        return "it needs compute capability 8.0, and the device has {}.{}".format(*capability)
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, and the model in {str(dtype).removeprefix('torch.')}"
    if head_width % 8 or head_width > WIDEST_HEAD:
        return f"it takes heads whose width is a multiple of 8 up to {WIDEST_HEAD}, and the model's have {head_width}"
    return ""


def varlen_kernel(name: str) -> VarlenKernel:
    """The flash kernel of that name. Its forward pass is deterministic, its backward pass adds in any order.

    Deterministic algorithms reach flash_attn's backward pass whenever they are on, torch's own only where they are on
    without warn_only.
    """
    return _package_kernel() if name == "flash_attn" else _torch_kernel()


def _torch_kernel() -> VarlenKernel:
    """torch 2.10 says is_causal and later ones window_size; from 2.12 on grouped heads have to be announced."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def kernel(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        output: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
        return output

    return kernel


def _package_kernel() -> VarlenKernel:
    from flash_attn import flash_attn_varlen_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(
            q, k, v, offsets, offsets, longest, longest, causal=True, deterministic=deterministic
        )

    return kernel
