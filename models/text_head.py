"""The language-model head: cross-entropy or the likeliest token at chosen positions, a chunk of logits at a time.

Shapes: T targets, W width, V / tp rows of the vocabulary on this rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from models.config import CHUNK_LOGITS, LanguageModelConfig
from models.language_model import megatron_config


class VocabParallelCrossEntropy(torch.autograd.Function):
    """fp32 losses [T] from hidden [T, W] and weight [V / tp, W]; logits are made again in backward.

    It may be driven backward twice (retain_graph), which megatron-core's own in-place version may not.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        local = labels - weight.shape[0] * dist.get_rank(group)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(losses)
        for part in _chunks(hidden, weight):
            normalisers[part], chosen = _log_normaliser(hidden[part], weight, local[part], group)
            losses[part] = normalisers[part] - chosen
        ctx.save_for_backward(hidden, weight, local, normalisers)
        ctx.group = group
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, local, normalisers = ctx.saved_tensors
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        for part in _chunks(hidden, weight):
            logits = torch.exp((hidden[part] @ weight.t()).float() - normalisers[part, None])
            rows, columns = _local_labels(local[part], weight.shape[0])
            logits[rows, columns] -= 1.0
            logits = (logits * gradient[part, None]).to(hidden.dtype)
            hidden_gradient[part] = logits @ weight
            weight_gradient.addmm_(logits.t(), hidden[part])
        dist.all_reduce(hidden_gradient, group=ctx.group)
        return hidden_gradient, weight_gradient, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_LOGITS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _local_labels(local: Tensor, rows_here: int) -> tuple[Tensor, Tensor]:
    """Which targets have their label on this rank, and its row."""
    here = ((local >= 0) & (local < rows_here)).nonzero().squeeze(1)
    return here, local[here]


def _log_normaliser(hidden: Tensor, weight: Tensor, local: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """log sum exp over the whole vocabulary, and the label's logit: fp32 [T] each."""
    logits = (hidden @ weight.t()).float()
    largest = logits.max(dim=1).values
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    here, columns = _local_labels(local, weight.shape[0])
    sums = torch.zeros(2, len(hidden), device=hidden.device)
    sums[0] = torch.exp(logits - largest[:, None]).sum(dim=1)
    sums[1, here] = logits[here, columns]
    dist.all_reduce(sums, group=group)
    return sums[0].log() + largest, sums[1]


@torch.no_grad()
def likeliest_tokens(hidden: Tensor, weight: Tensor, num_choices: int, group: dist.ProcessGroup) -> Tensor:
    """int64 [T]: of the first num_choices tokens of the vocabulary the one with the largest logit, the first of equals.

    hidden [T, W], weight [V / tp, W]. The ranks of the group get the same answer.
    """
    first = weight.shape[0] * dist.get_rank(group)
    own = weight[: max(0, num_choices - first)]
    largest = torch.full((len(hidden),), float("-inf"), device=hidden.device)
    tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    for part in _chunks(hidden, weight) if len(own) else []:
        largest[part], tokens[part] = (hidden[part] @ own.t()).float().max(dim=1)
    # A float64 holds a float32 and an index exactly, so one collective tells both.
    answers = torch.stack([largest.double(), (tokens + first).double()])
    parts = [torch.empty_like(answers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, answers, group=group)
    by_rank = torch.stack(parts)
    best = by_rank[:, 0].argmax(dim=0, keepdim=True)
    return by_rank[:, 1].gather(0, best).squeeze(0).long()


class LanguageModelHead(ColumnParallelLinear):
    """hidden [T, W], labels int64 [T] -> fp32 losses [T]; T may be 0. Without labels -> the likeliest text tokens.

    The weight is its own, as ZeRO-3 wants.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(
            config.width,
            config.vocabulary,
            config=megatron_config(),
            init_method=partial(nn.init.normal_, std=config.init_std),
            bias=False,
            gather_output=False,
            tp_group=get_tensor_model_parallel_group(),
        )
        self.text_vocab_size = config.text_vocab_size

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return likeliest_tokens(hidden, self.weight, self.text_vocab_size, get_tensor_model_parallel_group())
        return VocabParallelCrossEntropy.apply(hidden, self.weight, labels, get_tensor_model_parallel_group())
