"""LanguageModel and its head's weight against transformers' LLaMA, with the same weights in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from models.config import LanguageModelConfig
from models.language_model import LanguageModel
from models.text_head import LanguageModelHead

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def both_models(num_kv_heads: int) -> tuple[LanguageModel, LanguageModelHead, LlamaForCausalLM]:
    """Ours with the weights of theirs; logits have a standard deviation of about 1. rope_base is not the default."""
    config = LanguageModelConfig(
        text_vocab_size=60,
        width=48,
        num_layers=3,
        num_heads=6,
        num_kv_heads=num_kv_heads,
        mlp_width=80,
        norm_eps=1e-5,
        rope_base=500.0,
        init_std=0.2,
    )
    ours, head = LanguageModel(config), LanguageModelHead(config)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=num_kv_heads,
            intermediate_size=80,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=False,
            attn_implementation="eager",
            initializer_range=0.2,
        )
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    copy_weights(ours, head, theirs)
    return ours, head, theirs


@torch.no_grad()
def copy_weights(ours: LanguageModel, head: LanguageModelHead, theirs: LlamaForCausalLM) -> None:
    """The names are Hugging Face's; every parameter of either side finds its partner."""
    wanted = {f"model.{name}": parameter for name, parameter in ours.named_parameters()} | {
        f"lm_head.{name}": parameter for name, parameter in head.named_parameters()
    }
    given = dict(theirs.named_parameters())
    assert wanted.keys() == given.keys()
    for name, parameter in wanted.items():
        assert parameter.shape == given[name].shape, name
        parameter.copy_(given[name])


def logits(model: LanguageModel, head: LanguageModelHead, ids: Tensor, documents: Tensor, positions: Tensor) -> Tensor:
    return model(model.embed_tokens(ids), documents, positions) @ head.weight.t()


@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_one_document_equals_llama(num_kv_heads: int) -> None:
    """Logits within 1e-5."""
    ours, head, theirs = both_models(num_kv_heads)
    ids = torch.randint(64, (2, 37))
    positions = torch.arange(37).expand(2, -1)
    actual = logits(ours, head, ids, torch.ones_like(ids, dtype=torch.int32), positions)
    torch.testing.assert_close(actual, theirs(ids).logits, **TOLERANCE)
    assert actual.std() > 0.3, "the comparison would be empty"


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_packed_rows_equal_separate_documents(num_kv_heads: int) -> None:
    """Each document of a packed row has the logits that transformers' model gives it alone, within 1e-5."""
    ours, head, theirs = both_models(num_kv_heads)
    rows, row_length = [[11, 3, 20], [1, 17], [34]], 40
    ids = torch.randint(64, (3, row_length))
    documents, positions = torch.zeros(3, row_length, dtype=torch.int32), torch.zeros(3, row_length, dtype=torch.int64)
    spans = []
    for r, lengths in enumerate(rows):
        begin = 0
        for number, length in enumerate(lengths, start=1):
            documents[r, begin : begin + length] = number
            positions[r, begin : begin + length] = torch.arange(length)
            spans.append((r, slice(begin, begin + length)))
            begin += length
    packed = logits(ours, head, ids, documents, positions)
    for r, span in spans:
        alone = theirs(ids[r : r + 1, span]).logits[0]
        torch.testing.assert_close(packed[r, span], alone, **TOLERANCE)


def test_gradients_equal_llama() -> None:
    """Gradient of every parameter within 1e-4 of its norm."""
    ours, head, theirs = both_models(num_kv_heads=2)
    ids = torch.randint(64, (2, 19))
    upstream = torch.randn(2, 19, 64)
    positions = torch.arange(19).expand(2, -1)
    (logits(ours, head, ids, torch.ones_like(ids, dtype=torch.int32), positions) * upstream).sum().backward()
    (theirs(ids).logits * upstream).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        reference = expected[f"model.{name}"]
        assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm(), name


def test_start_of_weights() -> None:
    """init_std, shrunk by 1 / sqrt(2 x layers) where a projection writes into the residual stream; within 3 %."""
    config = LanguageModelConfig(
        text_vocab_size=1000, width=256, num_layers=2, num_heads=4, num_kv_heads=4, mlp_width=512, init_std=0.02
    )
    model = LanguageModel(config)
    layer = model.layers[0]
    for weight in (model.embed_tokens.weight, layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        assert weight.std().item() == pytest.approx(0.01, rel=0.03)
