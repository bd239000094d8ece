"""The export job: what it writes, which checkpoint it takes, what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from conf import UserError, run_cli
from data_pipelines.tokenizer import Tokenizer
from models.config import ModelConfig, VisionConfig
from models.emu import Emu
from tests.conftest import full_disk
from tests.data_pipelines.byte_level import BOS, write_byte_level
from tests.inference.conftest import STEP, save_run
from trainer import export as export_job
from trainer.export import ExportConfig, export, parse, write_weights

FILES = {
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.model",
    "pyproject.toml",
    "README.md",
    "emu_inference",
}


@pytest.fixture
def run_copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_folder_holds_all_that_is_needed_and_nothing_else(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES | {"model-00001-of-00001.safetensors"}
    code = {path.name for path in (exported / "emu_inference").iterdir() if path.name != "__pycache__"}
    assert {"vision_encoder.py", "causal_transformer.py", "modeling_emu.py", "__main__.py"} <= code
    assert all(name.endswith(".py") for name in code)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in exported.iterdir()), "others may read it"
    readme = (exported / "README.md").read_text()
    assert f"{STEP} training steps" in readme and "$" not in readme
    assert [path.name for path in exported.parent.iterdir()] == [exported.name], "no temporary folder is left"


def test_config_says_what_the_model_was_built_and_trained_with(
    package: ModuleType, exported: Path, model_config: ModelConfig
) -> None:
    config = package.EmuConfig.from_pretrained(exported)
    num_pieces = model_config.language_model.text_vocab_size
    tokens = config.tokens
    assert [tokens.pad, tokens.img_start, tokens.img_end, tokens.image] == list(range(num_pieces, num_pieces + 4))
    assert (tokens.bos, tokens.eos) == (1, 2)
    assert config.language_model.vocab_size == num_pieces + 4
    assert tuple(config.vision.pixel_mean) == VisionConfig.pixel_mean
    assert tuple(config.vision.pixel_std) == VisionConfig.pixel_std
    assert (config.step, config.dtype) == (STEP, "float32")
    assert config.objective["regression_gradient"] == "full"


def test_every_weight_is_exported_bit_for_bit(exported: Path, reference: Emu) -> None:
    weights = load_all(exported)
    expected = {
        name.replace("language_model.", "language_model.model.").replace("text_head", "language_model.lm_head"): value
        for name, value in reference.named_parameters()
    }
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_weights_are_cut_into_shards_of_the_size_asked_for(run_dir: Path, reference: Emu, tmp_path: Path) -> None:
    limit = 100_000
    num_parameters = write_weights(tmp_path, next((run_dir / "checkpoints").glob("step-*")), torch.bfloat16, limit)
    assert num_parameters == sum(parameter.numel() for parameter in reference.parameters())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * num_parameters
    shards = {path.name: load_file(path) for path in tmp_path.glob("model-*.safetensors")}
    assert set(shards) == {f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    assert {name: file for file, shard in shards.items() for name in shard} == index["weight_map"]
    sizes = [sum(weight.nbytes for weight in shard.values()) for shard in shards.values()]
    assert len(sizes) > 2 and max(sizes) <= limit
    assert all(weight.dtype == torch.bfloat16 for shard in shards.values() for weight in shard.values())


def test_newest_whole_checkpoint_is_taken_unless_one_is_named(
    run_copy: Path, reference: Emu, model_config: ModelConfig, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def exported_step(config: ExportConfig) -> int:
        return int(json.loads((export(config) / "config.json").read_text())["step"])

    newer = save_run(run_copy, reference, model_config, tokenizer_path, step=STEP + 1)
    assert exported_step(ExportConfig(run_dir=str(run_copy))) == STEP + 1
    assert "python -m emu_inference caption IMAGE" in capsys.readouterr().out
    older = newer.with_name(f"step-{STEP:08d}")
    assert exported_step(ExportConfig(checkpoint=str(older))) == STEP, "an earlier export is replaced"
    (newer / "fragments-00000.safetensors").write_bytes(b"broken")
    assert exported_step(ExportConfig(run_dir=str(run_copy))) == STEP
    with pytest.raises(UserError, match="not a whole checkpoint"):
        export(ExportConfig(checkpoint=str(newer)))


def test_a_folder_that_is_no_export_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    precious = tmp_path / "config.json"
    precious.write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="not an export"):
        export(ExportConfig(run_dir=str(run_dir), out=str(tmp_path)))
    with pytest.raises(UserError, match="not an export"):
        export(ExportConfig(run_dir=str(run_dir), out=str(precious)))
    assert list(tmp_path.iterdir()) == [precious]


def test_an_export_that_fails_leaves_the_earlier_one(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(run_dir=str(run_copy), out=str(tmp_path / "out"), dtype="bf16")
    before = load_all(export(config))

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(export_job, "write_package", fail)
        with pytest.raises(OSError, match="no space"):
            export(ExportConfig(run_dir=str(run_copy), out=str(tmp_path / "out")))
    after = load_all(tmp_path / "out")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert export(config) == tmp_path / "out", "what the failed one left is in nobody's way"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_full_disk_is_one_sentence(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", f"run_dir={run_copy}"])
    with full_disk(10_000), pytest.raises(SystemExit) as exit_:
        run_cli(export_job.main)
    assert exit_.value.code == 2
    sentence = f"error: {run_copy}/export.partial/shard-1: File too large: mend that and run the command again\n"
    assert capsys.readouterr() == ("", sentence)


def test_a_tokenizer_json_goes_with_the_export(
    package: ModuleType, reference: Emu, model_config: ModelConfig, tmp_path: Path
) -> None:
    write_byte_level(tmp_path / "llama")
    checkpoint = save_run(tmp_path / "run", reference, model_config, tmp_path / "llama")
    exported = export(ExportConfig(checkpoint=str(checkpoint)))
    named = {path.name for path in exported.iterdir() if "tokenizer" in path.name}
    assert named == {"tokenizer.json", "tokenizer_config.json"}
    ours, processor = Tokenizer(tmp_path / "llama"), package.EmuProcessor.from_pretrained(exported)
    text = f"a small {BOS} circle\n\u2603 [IMG]"
    [ids] = ours.encode([text])
    assert processor([[text]]).input_ids.tolist() == [[ours.bos, *ids]]
    assert processor.decode([[ours.bos, *ids, ours.eos, ours.image, ours.pad]]) == [text]


def test_another_tokenizer_is_refused(run_dir: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    import sentencepiece.sentencepiece_model_pb2 as proto

    changed = proto.ModelProto.FromString(tokenizer_path.read_bytes())
    changed.pieces[300].score -= 1
    other = tmp_path / "other.model"
    other.write_bytes(changed.SerializeToString())
    with pytest.raises(UserError, match="not the one that the model was trained with"):
        export(ExportConfig(run_dir=str(run_dir), tokenizer=str(other), out=str(tmp_path / "out")))
    moved = shutil.copy(tokenizer_path, tmp_path / "moved.model")
    export(ExportConfig(run_dir=str(run_dir), tokenizer=str(moved), out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run_dirr=x"], "run_dirr=x"),
        (["outputs/run"], "key=value"),
        (["run_dir=x", "shard_mb=big"], "shard_mb=big"),
        (["run_dir=x", "shard_mb=0"], "shard_mb=0"),
        (["run_dir=nowhere"], "run_dir=nowhere"),
        (["run_dir=x", "dtype=fp8"], "dtype=fp8"),
        (["out=x"], "nothing to export"),
        (["checkpoint=nowhere"], "checkpoint=nowhere"),
    ],
)
def test_wrong_settings_are_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        export(parse(arguments))
    assert "\n" not in str(caught.value)


def test_command_line_makes_an_export(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", f"run_dir={run_copy}", "dtype=bf16"])
    export_job.main()
    assert {path.name for path in (run_copy / "export").iterdir()} > FILES
    assert str(run_copy / "export") in capsys.readouterr().out
    assert all(weight.dtype == torch.bfloat16 for weight in load_all(run_copy / "export").values())
