"""What the ranks of a tensor-parallel group exchange beside megatron-core's own layers.

Shapes: M images in all, m of them encoded by this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn


def enter_column_parallel(x: Tensor, sequence_parallel: bool) -> Tensor:
    """The input [T, W] of column-parallel layers, whole on every rank; its gradient is summed over the ranks once for
    all layers that read it (they are made with disable_grad_reduce)."""
    group = get_tensor_model_parallel_group()
    if sequence_parallel:
        return gather_from_sequence_parallel_region(x, group=group)
    return copy_to_tensor_model_parallel_region(x, group=group)


def gather_images(own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Embeddings [m, N, W] of this rank's images -> [M, N, W] of all ranks' ones, rank after rank.

    counts: m of every rank of the group. What the encoder's weights get in backward is their rank's part of the
    gradient: see `sum_gradients`.
    """
    return _GatherImages.apply(own, counts, group) if len(counts) > 1 and any(counts) else own


class _GatherImages(torch.autograd.Function):
    """Backward hands each rank the gradient of its own images, not a sum: every rank has the whole gradient already,
    since the language model sums that of its input."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.own], None, None


def sum_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum the gradients of these over the group in every backward pass from now on.

    They are those of parameters that each rank of the group applies to a part of the data: the encoders to its images,
    and with sequence parallelism the norms to its positions. All ranks must drive them backward in the same order.
    """

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    for parameter in parameters:
        parameter.register_hook(summed)
