"""Two tensor-parallel ranks give what one process gives: head and language model, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from models import text_head
from models.config import LanguageModelConfig
from models.language_model import LanguageModel
from models.text_head import VocabParallelCrossEntropy
from tests.distributed.harness import run_distributed

TP, VOCAB, WIDTH = 2, 24, 16
CONFIG = LanguageModelConfig(
    text_vocab_size=VOCAB - 4, width=WIDTH, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20, init_std=0.2
)


def head_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, whole weight, labels in both halves of the vocabulary, upstream gradient."""
    draw = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, WIDTH, generator=draw), torch.randn(VOCAB, WIDTH, generator=draw)
    return hidden, weight, torch.randint(VOCAB, (9,), generator=draw), torch.randn(9, generator=draw)


def language_model_results() -> dict[str, Tensor]:
    """Hidden states of two packed documents, and gradients of the embedding table and of a norm."""
    torch.manual_seed(5)
    model = LanguageModel(CONFIG)
    ids = torch.arange(14).view(1, 14) % VOCAB
    documents = torch.tensor([[1] * 6 + [2] * 8], dtype=torch.int32)
    positions = torch.tensor([[*range(6), *range(8)]])
    hidden = model(model.embed_tokens(ids), documents, positions)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {
        "hidden states": hidden.detach(),
        "gradient of a norm": model.layers[0].input_layernorm.weight.grad,
        "gradient of the table, sharded": model.embed_tokens.weight.grad,
    }


def results_of_rank() -> dict[str, Tensor]:
    """What one tensor-parallel rank computes; of sharded tensors its own rows."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=TP)
    text_head.CHUNK_LOGITS = 4 * VOCAB // TP
    hidden, weight, labels, upstream = head_case()
    rows = weight.chunk(TP)[parallel_state.get_tensor_model_parallel_rank()].clone().requires_grad_()
    hidden.requires_grad_()
    losses = VocabParallelCrossEntropy.apply(hidden, rows, labels, parallel_state.get_tensor_model_parallel_group())
    losses.backward(upstream)
    return {
        "losses": losses.detach(),
        "gradient of hidden": hidden.grad,
        "gradient of the head, sharded": rows.grad,
        **language_model_results(),
    }


def results_of_one_process() -> dict[str, Tensor]:
    """The head by plain cross-entropy, the language model without tensor parallelism."""
    hidden, weight, labels, upstream = head_case()
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    losses.backward(upstream)
    return {
        "losses": losses.detach(),
        "gradient of hidden": hidden.grad,
        "gradient of the head, sharded": weight.grad,
        **language_model_results(),
    }


@pytest.mark.slow
def test_two_ranks_equal_one_process() -> None:
    """Within 1e-5: whole results on both ranks, sharded ones side by side."""
    ranks = run_distributed(results_of_rank, TP)
    for name, expected in results_of_one_process().items():
        found = [rank[name] for rank in ranks]
        for actual in [torch.cat(found)] if name.endswith("sharded") else found:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=name)
