from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conf import UserError
from launch import plan
from launch.parameters import count_parameters
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


def test_flags_and_overrides_may_be_mixed() -> None:
    args = plan.parse_args(["model=emu_14b", "--gpus", "32", "parallel.zero_stage=3"])
    assert args.overrides == ["model=emu_14b", "parallel.zero_stage=3"]
    assert args.gpus == 32


PLAN = ["launch.plan", "+experiment=emu_7b", "--gpus", "8", "--gpu-memory-gb"]


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    monkeypatch.setenv("EMU_DATA", "/data/emu")
    monkeypatch.setattr("sys.argv", [*PLAN, *arguments])
    plan.main()
    return capsys.readouterr().out.splitlines()


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, gradients and Adam of ZeRO-1: 2 + 2 + 12 / 8 bytes for each of 7.895 B parameters."""
    lines = printed(monkeypatch, capsys, "80")
    (row,) = (line.split() for line in lines if line.startswith("    1 "))
    assert [float(cell) for cell in row[1:4]] == pytest.approx([15.8, 15.8, 11.8], abs=0.05)
    assert sum(map(float, row[1:7])) == pytest.approx(float(row[7]), abs=0.3)
    assert float(row[7]) + float(row[8]) == pytest.approx(80, abs=0.1)
    assert lines[-1] == "Lowest stage that fits: parallel.zero_stage=1 (fullest moment: backward, heads)"
    assert max(map(len, lines)) <= 80


def test_the_configuration_decides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(printed(monkeypatch, capsys, "50", "data.micro_batch_rows=4"))
    assert "Nothing fits: use more GPUs" in text
    rows = ("data.micro_batch_rows=4", "parallel.activation_checkpointing=full")
    assert "Lowest stage that fits: parallel.zero_stage=2" in "\n".join(printed(monkeypatch, capsys, "50", *rows))
    lines = printed(monkeypatch, capsys, "50", "parallel.offload_optimizer=cpu", "parallel.zero_stage=2")
    assert not any(line.startswith("    0 ") for line in lines)
    assert next(line for line in lines if line.startswith("    2 ")).split()[3] == "0.0"


def test_wrong_input_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"num_kv_heads=32 is not a multiple of parallel\.tensor=3"):
        printed(monkeypatch, capsys, "80", "parallel.tensor=3")
    with pytest.raises(UserError, match=r"6 processes are no multiple of parallel\.tensor=4"):
        printed(monkeypatch, capsys, "80", "--gpus", "6", "parallel.tensor=4")
    with pytest.raises(UserError, match=r"parallel\.precision=fp8 is not known"):
        printed(monkeypatch, capsys, "80", "parallel.precision=fp8")
