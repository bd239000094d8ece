"""Which attention kernel is chosen where, and that the language model uses it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf import UserError
from models.attention_backend import WIDEST_HEAD, attention_backend, choose_backend
from models.config import LanguageModelConfig
from models.language_model import LanguageModel
from tests.models.varlen_stand_ins import stand_in

BOTH = ("varlen", "flash_attn")
AMPERE, TURING = (8, 0), (7, 5)

CHOICES = [
    # (wanted, dtype, head width, compute capability, installed, chosen)
    ("auto", torch.bfloat16, 128, AMPERE, BOTH, "varlen"),
    ("auto", torch.float16, WIDEST_HEAD, (9, 0), BOTH, "varlen"),
    ("auto", torch.bfloat16, 128, AMPERE, ("flash_attn",), "flash_attn"),
    ("auto", torch.bfloat16, 128, AMPERE, (), "sdpa"),
    ("auto", torch.float32, 128, AMPERE, BOTH, "sdpa"),
    ("auto", torch.bfloat16, 128, TURING, BOTH, "sdpa"),
    ("auto", torch.bfloat16, 100, AMPERE, BOTH, "sdpa"),
    ("auto", torch.bfloat16, WIDEST_HEAD + 8, AMPERE, BOTH, "sdpa"),
    ("auto", torch.bfloat16, 128, None, BOTH, "sdpa"),
    ("flash_attn", torch.bfloat16, 128, AMPERE, BOTH, "flash_attn"),
    ("varlen", torch.float16, 64, AMPERE, BOTH, "varlen"),
    ("sdpa", torch.bfloat16, 128, AMPERE, BOTH, "sdpa"),
    ("sdpa", torch.float32, 100, None, (), "sdpa"),
]


@pytest.mark.parametrize(("wanted", "dtype", "head_width", "capability", "installed", "chosen"), CHOICES)
def test_choice(
    wanted: str,
    dtype: torch.dtype,
    head_width: int,
    capability: tuple[int, int] | None,
    installed: tuple[str, ...],
    chosen: str,
) -> None:
    assert choose_backend(wanted, dtype, head_width, capability, installed) == chosen


@pytest.mark.parametrize(
    ("dtype", "head_width", "capability", "installed", "reason"),
    [
        (torch.bfloat16, 128, None, (), "it needs a CUDA device"),
        (torch.bfloat16, 128, TURING, BOTH, "it needs compute capability 8.0, and the device has 7.5"),
        (torch.float32, 128, AMPERE, BOTH, "it computes in bf16 and fp16, and the model in float32"),
        (torch.bfloat16, 100, AMPERE, BOTH, "a multiple of 8 up to 192, and the model's have 100"),
        (torch.bfloat16, 128, AMPERE, ("varlen",), "it is not installed"),
    ],
)
def test_a_wanted_kernel_that_cannot_run_is_refused(
    dtype: torch.dtype,
    head_width: int,
    capability: tuple[int, int] | None,
    installed: tuple[str, ...],
    reason: str,
) -> None:
    with pytest.raises(UserError) as refusal:
        choose_backend("flash_attn", dtype, head_width, capability, installed)
    sentence = str(refusal.value)
    assert sentence.startswith("model.language_model.attention=flash_attn cannot run here (")
    assert f"{reason}): choose auto or sdpa" in sentence


def test_a_cpu_takes_sdpa() -> None:
    assert attention_backend("auto", torch.device("cpu"), torch.bfloat16, 128) == "sdpa"


CONFIG = LanguageModelConfig(
    text_vocab_size=20, width=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=48, init_std=0.2
)


def test_the_language_model_asks_for_its_setting_and_refuses_what_cannot_run() -> None:
    model = LanguageModel(replace(CONFIG, attention="varlen"))
    with pytest.raises(UserError, match="attention=varlen cannot run here"):
        model(torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.int32), torch.arange(5)[None])


@pytest.mark.parametrize("name", ["varlen of this torch", "flash_attn"])
def test_the_language_model_computes_the_same_with_either_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of packed rows within 1e-5, fp32; the kernel is asked for with the model's own sizes."""
    model = LanguageModel(CONFIG)
    documents = torch.tensor([[1] * 7 + [2] * 4 + [0] * 2, [1] * 13], dtype=torch.int32)
    positions = torch.tensor([[*range(7), *range(4), 0, 0], [*range(13)]])
    embeddings = torch.randn(2, 13, 32)
    expected = model(embeddings, documents, positions)[documents > 0]

    asked = []
    backend = stand_in(name, monkeypatch)
    monkeypatch.setattr("models.language_model.attention_backend", lambda *what: asked.append(what) or backend)
    actual = model(embeddings, documents, positions)[documents > 0]
    assert asked == [("auto", torch.device("cpu"), torch.float32, 8)]
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-5)
    assert not torch.equal(actual, expected), "the same kernel ran twice"
