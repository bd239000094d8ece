from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.plan import count_parameters, parse_args, stage_memory
from models.config import LanguageModelConfig, ModelConfig
from models.emu import build_causal_transformer, build_vision_encoder


def test_emu_14b_has_the_published_size() -> None:
    """Expected figures: arithmetic on the released configurations (less the vision tower's unused norm and head)."""
    counts = count_parameters(ModelConfig(name="emu_14b"))
    assert sum(counts.values()) == pytest.approx(14.18e9, abs=0.005e9)
    unused = 2 * 1408 + 1408 * 1024 + 1024
    assert counts["vision encoder"] - 2 * 1408 + unused == pytest.approx(1012.6e6, abs=0.05e6)
    assert counts["causal transformer"] == pytest.approx(129.0e6, abs=0.05e6)
    assert counts["language model"] == 13_015_864_320 + 2 * 4 * 5120  # LLaMA-13B as released, four rows in each table
    assert counts["regression head"] == 26_214_400


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_counts_equal_built_modules() -> None:
    """The language model against transformers' LLaMA, with grouped heads; the others against their own modules."""
    model = ModelConfig(name="test", language_model=LanguageModelConfig(num_layers=2, num_kv_heads=8))
    model.vision.num_layers = model.causal_transformer.num_layers = 2
    language = model.language_model
    llama = LlamaConfig(
        vocab_size=language.text_vocab_size + 4,
        hidden_size=language.width,
        intermediate_size=language.mlp_width,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        num_key_value_heads=language.num_kv_heads,
    )
    with torch.device("meta"):
        built = {
            "vision encoder": build_vision_encoder(model.vision),
            "causal transformer": build_causal_transformer(model.causal_transformer, 1408, language.width),
            "language model": LlamaForCausalLM(llama),
        }
    counts = count_parameters(model)
    for part, module in built.items():
        assert counts[part] == num_parameters(module), part


@pytest.mark.parametrize(("stage", "total_gb"), [(0, 16.0), (1, 4 + 1.5), (2, 2 + 14 / 8), (3, 2.0)])
def test_memory_by_stage(stage: int, total_gb: float) -> None:
    """The ZeRO paper's own arithmetic for 16 bytes a parameter, 1 B parameters, 8 GPUs."""
    assert stage_memory(10**9, num_gpus=8, stage=stage, precision="bf16").total == pytest.approx(total_gb * 1e9)


def test_flags_and_overrides_may_be_mixed() -> None:
    args = parse_args(["model=emu_14b", "--gpus", "32", "parallel.zero_stage=3"])
    assert args.overrides == ["model=emu_14b", "parallel.zero_stage=3"]
    assert args.gpus == 32
