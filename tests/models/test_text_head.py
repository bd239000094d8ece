"""VocabParallelCrossEntropy against F.cross_entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor

from models import text_head
from models.config import LanguageModelConfig
from models.text_head import LanguageModelHead, VocabParallelCrossEntropy

WIDTH, VOCAB = 16, 50


def case(num_targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, W], weight [V, W] and labels [T]; logits have a standard deviation of about 8, so that exp matters."""
    hidden = torch.randn(num_targets, WIDTH, requires_grad=True)
    weight = (2 * torch.randn(VOCAB, WIDTH)).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (num_targets,))


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return VocabParallelCrossEntropy.apply(hidden, weight, labels, get_tensor_model_parallel_group())


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="none")


@pytest.mark.parametrize("targets_per_chunk", [1, 3, 7, 8, 1000])
def test_values_and_gradients(targets_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 targets in chunks of several sizes. fp32 losses and gradients within 1e-5 of float64's."""
    monkeypatch.setattr(text_head, "CHUNK_LOGITS", targets_per_chunk * VOCAB)
    hidden, weight, labels = case(21)
    losses, expected = ours(hidden, weight, labels), exact(hidden, weight, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)

    upstream = torch.randn(21)
    actual = torch.autograd.grad(losses, (hidden, weight), upstream)
    reference = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    for one, other in zip(actual, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_chunk_never_holds_more_logits_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_head, "CHUNK_LOGITS", 4 * VOCAB + 1)
    hidden, weight, _ = case(11)
    covered = [index for part in text_head._chunks(hidden, weight) for index in range(11)[part]]
    assert covered == list(range(11))
    assert max(len(hidden[part]) for part in text_head._chunks(hidden, weight)) == 4


def test_large_logits_do_not_overflow() -> None:
    """Logits of +-400 overflow exp in fp32; losses within 1e-3 of several hundreds."""
    weight = torch.tensor([[400.0], [-400.0], [0.0]])
    losses = ours(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(losses, torch.tensor([0.0, 800.0, 400.0]), rtol=0, atol=1e-3)


def test_no_targets_is_an_empty_tensor_with_zero_gradients() -> None:
    hidden, weight, labels = case(0)
    losses = ours(hidden, weight, labels)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, WIDTH)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(VOCAB, WIDTH))


def test_backward_twice_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: nothing that backward needs is changed in place. megatron-core's own cross-entropy fails this."""
    monkeypatch.setattr(text_head, "CHUNK_LOGITS", 5 * VOCAB)
    hidden, weight, labels = case(12)
    loss = ours(hidden, weight, labels).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip(first, second, strict=True):
        assert one.abs().sum() > 0
        assert torch.equal(one, other)


def test_half_precision_sums_in_fp32() -> None:
    """bf16 hidden states and weight: losses are fp32, within bf16's rounding (2 %) of float64's; gradients are bf16."""
    hidden, weight, labels = case(9)
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
    losses = ours(hidden, weight, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact(hidden, weight, labels), rtol=0.02, atol=0.05)
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_head_covers_the_special_tokens() -> None:
    """The head's vocabulary is the tokenizer's pieces and the four special tokens, without a bias."""
    config = LanguageModelConfig(
        text_vocab_size=30, width=WIDTH, num_layers=1, num_heads=1, num_kv_heads=1, mlp_width=8
    )
    head = LanguageModelHead(config)
    assert {name: tuple(value.shape) for name, value in head.named_parameters()} == {"weight": (34, WIDTH)}
    hidden, labels = torch.randn(5, WIDTH), torch.tensor([0, 29, 33, 7, 30])
    torch.testing.assert_close(head(hidden, labels).double(), exact(hidden, head.weight, labels), rtol=1e-6, atol=1e-5)
