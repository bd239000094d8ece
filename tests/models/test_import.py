"""Weights of other makers: every layout as its makers publish it, against transformers and bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM

from conf import UserError, run_cli
from models.config import LanguageModelConfig
from models.language_model import LanguageModel
from models.text_head import LanguageModelHead
from models.weights import export_, import_
from models.weights.fragment_files import read_weights
from models.weights.tensor_files import open_tensors
from tests.conftest import full_disk
from tests.models import foreign_files
from tests.models.foreign_files import VOCABULARY, WIDTH

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def run_import(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> dict[str, Any]:
    """weights.json of what the command makes."""
    monkeypatch.setattr(sys, "argv", ["import_", "--out", str(out), *arguments])
    import_.main()
    return json.loads((out / "weights.json").read_text())


def refusal(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        run_import(monkeypatch, out, *arguments)
    assert not out.exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        {"num_key_value_heads": 1, "head_dim": 12, "rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
        {"tie_word_embeddings": True},
        {"model_class": MistralForCausalLM, "num_key_value_heads": 3, "head_dim": 8},
    ],
    ids=["llama-1", "grouped", "llama-3", "linear", "tied", "mistral"],
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Within 1e-5 of their spread, over positions at which every kind of RoPE scaling tells."""
    theirs = foreign_files.save_llama(tmp_path / "llama", **changes)
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    description = run_import(monkeypatch, tmp_path / "start", "--language-model", str(tmp_path / "llama"))
    config = LanguageModelConfig(**description["model"]["language_model"])
    ours, head = LanguageModel(config), LanguageModelHead(config)
    given = dict(read_weights(tmp_path / "start"))
    head.load_state_dict({"weight": given.pop("text_head.weight")})
    ours.load_state_dict({name.removeprefix("language_model."): value for name, value in given.items()})

    ids = torch.randint(60, (2, 60))
    documents, positions = torch.ones_like(ids, dtype=torch.int32), torch.arange(60).expand(2, -1)
    hidden = ours(ours.embed_tokens(ids), documents, positions)
    with torch.no_grad():
        expected = theirs(ids).logits
    spread = float(expected.std())
    assert spread > 0.3, "the comparison would be empty"
    torch.testing.assert_close(hidden @ head.weight[:60].t(), expected, rtol=0, atol=1e-5 * spread)
    for table in (ours.embed_tokens.weight, head.weight):
        assert len(table) == 64
        torch.testing.assert_close(table[60:], table[:60].mean(dim=0).expand(4, -1))


def test_a_tower_keeps_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = foreign_files.eva_clip()
    torch.save({"module": state}, tmp_path / "eva.pt")
    description = run_import(monkeypatch, tmp_path / "start", "--vision", str(tmp_path / "eva.pt"))
    assert description["model"]["vision"] == {
        **{"image_size": 8, "patch_size": 4, "width": 16, "num_layers": 2, "mlp_width": 24}
    }
    assert description["fresh"] == ["vision_encoder.ln_visual.weight", "vision_encoder.ln_visual.bias"]
    assert "data.tokenizer" not in capsys.readouterr().out
    given = dict(read_weights(tmp_path / "start"))
    expected = {name: value for name, value in state.items() if name.startswith("visual.")}
    assert len(given) == len(expected) - 4
    for name, value in given.items():
        assert torch.equal(value, expected[name.replace("vision_encoder.", "visual.")]), name


@pytest.mark.parametrize(
    ("file", "named"),
    [("tokenizer.model", "{folder}"), ("tokenizer.json", "{folder}"), ("other.model", "ITS_TOKENIZER")],
)
def test_the_command_ends_with_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str, named: str
) -> None:
    folder, out = tmp_path / "llama", tmp_path / "start"
    foreign_files.save_llama(folder)
    (folder / file).write_bytes(b"")
    run_import(monkeypatch, out, "--language-model", str(folder))
    tokenizer = named.format(folder=folder)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"next: python -m trainer.pretrain init.weights={out} data.tokenizer={tokenizer} and those")


def as_published(ours: str) -> str:
    """Where the released checkpoint keeps a parameter of ours, written down a second time, by rules."""
    rules = [
        ("vision_encoder.ln_visual", "ln_visual"),
        ("vision_encoder", "visual"),
        ("causal_transformer.queries", "cformer.causal_tokens"),
        ("causal_transformer.projection", "cformer.projection"),
        ("causal_transformer.relative", "cformer.cformer.block.0.layer.0.SelfAttention.relative"),
        ("causal_transformer.final_norm", "cformer.cformer.final_layer_norm"),
        ("causal_transformer.blocks", "cformer.cformer.block"),
        (".self_norm.", ".layer.0.layer_norm."),
        (".self_attention.", ".layer.0.SelfAttention."),
        (".cross_norm.", ".layer.1.layer_norm."),
        (".cross_attention.", ".layer.1.EncDecAttention."),
        (".mlp_norm.", ".layer.2.layer_norm."),
        (".mlp.w", ".layer.2.DenseReluDense.w"),
        ("language_model", "decoder.lm.model"),
        ("text_head", "decoder.lm.lm_head"),
        ("regression_head", "decoder.lm.stu_regress_head"),
    ]
    for old, new in rules:
        ours = ours.replace(old, new, 1)
    return ours


def assert_published(given: dict[str, Tensor], state: dict[str, Tensor], skipped: str = "nothing") -> None:
    unused = ("inv_freq", "cformer.cformer.embed_tokens", "visual.norm", "visual.head")
    assert {as_published(name) for name in given} == {name for name in state if not any(u in name for u in unused)}
    for name, value in given.items():
        if skipped not in name:
            assert torch.equal(value, state[as_published(name)].float()), name


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_released_emu_keeps_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    state = foreign_files.emu()
    torch.save({"module": state} if wrapped else state, tmp_path / "emu.bin")
    description = run_import(monkeypatch, tmp_path / "start", "--emu", str(tmp_path / "emu.bin"))
    assert_published(dict(read_weights(tmp_path / "start")), state)
    model = description["model"]
    assert model["language_model"] == {
        **{"text_vocab_size": VOCABULARY, "num_special_tokens": 4, "width": WIDTH, "num_layers": 2, "mlp_width": 48}
    }
    assert model["causal_transformer"]["num_queries"] == 3 and model["causal_transformer"]["head_width"] == 6
    assert description["fresh"] == []


@pytest.mark.parametrize("base_layer", [False, True])
def test_lora_of_either_peft_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_layer: bool) -> None:
    plain = foreign_files.emu(num_special=6)
    state = foreign_files.with_peft(plain, base_layer)
    torch.save(state, tmp_path / "instruct.pt")
    description = run_import(monkeypatch, tmp_path / "start", "--emu", str(tmp_path / "instruct.pt"))
    assert description["model"]["language_model"]["num_special_tokens"] == 6
    given = dict(read_weights(tmp_path / "start"))
    assert_published(given, plain, skipped="self_attn")
    for name, value in given.items():
        if "self_attn" in name:
            stem = as_published(name).replace("decoder.lm.", "decoder.lm.base_model.model.").removesuffix(".weight")
            a, b = (state[f"{stem}.lora_{which}.default.weight"] for which in "AB")
            torch.testing.assert_close(value, plain[as_published(name)].float() + b @ a)


def test_a_missing_and_a_misspelt_key_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = foreign_files.emu()
    del state["cformer.cformer.block.1.layer.1.EncDecAttention.k.weight"]
    state["visual.blocks.0.mlp.fcl.weight"] = state.pop("visual.blocks.0.mlp.fc1.weight")
    torch.save(state, tmp_path / "emu.bin")
    message = refusal(monkeypatch, tmp_path / "start", "--emu", str(tmp_path / "emu.bin"))
    assert "cformer.cformer.block.1.layer.1.EncDecAttention.k.weight is missing" in message
    assert "visual.blocks.0.mlp.fc1.weight is missing" in message
    assert "visual.blocks.0.mlp.fcl.weight is unknown" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("visual.blocks.1.attn.qkv.weight", (47, 16)),
        ("cformer.cformer.block.0.layer.2.DenseReluDense.wo.weight", (12, 21)),
        ("decoder.lm.model.layers.1.mlp.down_proj.weight", (32, 47)),
        ("decoder.lm.lm_head.weight", (27, 32)),
        ("decoder.lm.stu_regress_head.weight", (32, 31)),
        ("cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (8,)),
    ],
)
def test_misshapen_keys_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]
) -> None:
    torch.save(foreign_files.emu() | {name: torch.randn(shape)}, tmp_path / "emu.bin")
    message = refusal(monkeypatch, tmp_path / "start", "--emu", str(tmp_path / "emu.bin"))
    assert f"{name} has shape {list(shape)}" in message or "shapes of causal_transformer make no sense" in message


def test_half_a_lora_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = foreign_files.with_peft(foreign_files.emu(6), base_layer=True)
    del state["decoder.lm.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"]
    torch.save(state, tmp_path / "emu.pt")
    assert "layers.1.self_attn.v_proj" in refusal(monkeypatch, tmp_path / "start", "--emu", str(tmp_path / "emu.pt"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "of type 'gpt2'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "RoPE scaling 'yarn'"),
        ({"num_attention_heads": 5}, "does not describe the weights"),
        ({"hidden_size": "many"}, "no configuration of a LLaMA"),
    ],
)
def test_configurations_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    foreign_files.save_llama(tmp_path / "llama")
    edit_config(tmp_path / "llama", **changes)
    assert words in refusal(monkeypatch, tmp_path / "start", "--language-model", str(tmp_path / "llama"))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


def test_files_of_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.cls_token": torch.zeros(1), "x": Harmful()}, "harmful.pt")
    assert "nothing but tensors" in refusal(monkeypatch, tmp_path / "start", "--vision", "harmful.pt")
    assert not Path("harmed").exists()
    Path("cut.safetensors").write_bytes(b"\xff" * 20)
    assert "nothing but tensors" in refusal(monkeypatch, tmp_path / "start", "--vision", "cut.safetensors")
    folder = tmp_path / "llama"
    folder.mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks ../outside" in refusal(monkeypatch, tmp_path / "start", "--language-model", str(folder))
    assert "nothing to import" in refusal(monkeypatch, tmp_path / "start")
    assert "does not exist" in refusal(monkeypatch, tmp_path / "start", "--emu", "nowhere")


def test_values_are_stored_as_they_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(foreign_files.emu(), tmp_path / "emu.bin")
    run_import(monkeypatch, tmp_path / "start", "--emu", str(tmp_path / "emu.bin"))
    stored = open_tensors(tmp_path / "start" / "fragments-00000.safetensors")
    assert stored["language_model.norm.weight|weight"].dtype == torch.bfloat16
    assert stored["vision_encoder.cls_token|weight"].dtype == torch.float32


MEASURE = """
import re, sys, threading, time
from models.weights import export_, import_

def rss_anon():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

peak = before = rss_anon()

def watch():
    global peak
    while True:
        peak = max(peak, rss_anon())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
sys.argv = ["import_", "--out", sys.argv[2], "--language-model", sys.argv[1]]
import_.main()
print("MB", peak - before)
"""


@pytest.mark.slow
def test_memory_stays_near_the_largest_tensor(tmp_path: Path) -> None:
    """2 GB in two files, of holes: peak anonymous memory under 1.3 x the largest tensor + 200 MB."""
    folder = tmp_path / "llama"
    folder.mkdir()
    width, mlp, layers, rows = 2048, 5504, 7, 32000
    shapes = {f"model.{name}": (rows, width) for name in ("embed_tokens.weight",)} | {"model.norm.weight": (width,)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (width, width)
        for name in ("gate", "up", "down"):
            shape = (width, mlp) if name == "down" else (mlp, width)
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (width,)
    write_holes(folder / "model-1.safetensors", shapes)
    write_holes(folder / "model-2.safetensors", {"lm_head.weight": (rows, width)})
    assert sum(file.stat().st_size for file in folder.iterdir()) > 1.9e9
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "start")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    largest_mb = rows * width * 4 / 2**20
    assert float(done.stdout.rpartition("MB ")[2]) < 1.3 * largest_mb + 200


def write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of fp32 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(file.tell() + end)


def run_export(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, layout: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["export_", str(source), "--layout", layout, "--out", str(out), *arguments])
    export_.main()


def assert_same_weights(first: Path, second: Path) -> None:
    given, expected = dict(read_weights(first)), dict(read_weights(second))
    assert given.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in given.items())


def import_with_heads(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Tensor]:
    """A released Emu, imported to folder/start and described as completely as a run's checkpoint is."""
    state = foreign_files.emu()
    torch.save(state, folder / "emu.bin")
    description = run_import(monkeypatch, folder / "start", "--emu", str(folder / "emu.bin"))
    description["model"]["language_model"] |= {"num_heads": 4, "num_kv_heads": 4}  # which no shape tells
    (folder / "start" / "weights.json").write_text(json.dumps(description))
    return state


@pytest.mark.parametrize("inv_freq", [True, False])
def test_emu_out_and_in_again_keeps_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inv_freq: bool) -> None:
    """The file has exactly the keys and shapes of the released one, and imports as what it was."""
    state = import_with_heads(monkeypatch, tmp_path)
    run_export(monkeypatch, tmp_path / "start", tmp_path / "out", "emu", *([] if inv_freq else ["--no-inv-freq"]))
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    released = {name: value.shape for name, value in state.items() if inv_freq or "inv_freq" not in name}
    assert written.keys() == released.keys()
    unused = ("visual.head", "cformer.cformer.embed_tokens")  # of the released model's own sizes
    assert all(value.shape == released[name] for name, value in written.items() if not name.startswith(unused))
    run_import(monkeypatch, tmp_path / "again", "--emu", str(tmp_path / "out" / "pytorch_model.bin"))
    assert_same_weights(tmp_path / "again", tmp_path / "start")


def test_llama_out_is_read_by_transformers_and_in_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = foreign_files.save_llama(tmp_path / "llama", num_key_value_heads=2, head_dim=12, rope_parameters=LLAMA3)
    run_import(monkeypatch, tmp_path / "start", "--language-model", str(tmp_path / "llama"))
    run_export(monkeypatch, tmp_path / "start", tmp_path / "out", "llama")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = torch.randint(60, (2, 60))
    with torch.no_grad():
        assert torch.equal(again(ids).logits[..., :60], theirs(ids).logits)
    run_import(monkeypatch, tmp_path / "again", "--language-model", str(tmp_path / "out"))
    given, expected = dict(read_weights(tmp_path / "again")), dict(read_weights(tmp_path / "start"))
    for name, value in given.items():  # which has rows for special tokens once more
        assert torch.equal(value[: len(expected[name])], expected[name]), name


@pytest.mark.parametrize(
    ("command", "arguments", "nbytes", "file"),
    [
        (import_, ["--emu", "emu.bin"], 10_000, "fragments-00000.safetensors"),
        (export_, ["start", "--layout", "llama"], 10_000, "model.safetensors"),
        (export_, ["start", "--layout", "emu"], 10_000, "weights.partial"),
        (export_, ["start", "--layout", "emu"], 1_000_000, "pytorch_model.bin"),
    ],
)
def test_a_full_disk_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: ModuleType,
    arguments: list[str],
    nbytes: int,
    file: str,
) -> None:
    import_with_heads(monkeypatch, tmp_path)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *arguments, "--out", "new"])
    with full_disk(nbytes), pytest.raises(SystemExit) as exit_:
        run_cli(command.main)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed == ("", f"error: new.partial/{file}: File too large: mend that and run the command again\n")
    monkeypatch.setenv("EMU_TRACEBACK", "1")
    with full_disk(nbytes), pytest.raises(OSError, match="File too large"):
        run_cli(command.main)
    assert not Path("new").exists()


def test_export_of_what_is_no_emu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="neither a checkpoint nor"):
        run_export(monkeypatch, tmp_path, tmp_path / "out", "llama")
    foreign_files.save_llama(tmp_path / "llama")
    run_import(monkeypatch, tmp_path / "start", "--language-model", str(tmp_path / "llama"))
    with pytest.raises(UserError, match="holds nothing of vision_encoder"):
        run_export(monkeypatch, tmp_path / "start", tmp_path / "out2", "emu")
