"""Export: a checkpoint becomes a folder that is used without anything of this repository.

<out>/config.json                       sizes, token ids, pixel constants, step, objective
<out>/model-00001-of-00002.safetensors  weights; model.safetensors.index.json says which are where
<out>/tokenizer.model, or tokenizer.json and tokenizer_config.json
<out>/emu_inference/                    the package: `python -m emu_inference caption IMAGE`
<out>/pyproject.toml, README.md         `pip install <out>`
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from conf import UserError, run_cli
from data_pipelines.tokenizer import Tokenizer
from models.weights.fragment_files import read_weights, write_json
from models.weights.tensor_files import TensorToWrite, write_safetensors
from trainer.checkpoint import read_state
from trainer.checkpoint_folder import SavedState, find_damage, find_latest
from trainer.run_folder import has_tokenizer

FORMAT = 1
MODEL_TYPE = "emu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "emu_inference"
SHARED_FILES = ("vision_encoder.py", "causal_transformer.py")
TRAINING_ONLY = ("attention", "dropout", "init_std", "text_vocab_size", "num_special_tokens")


@dataclass
class ExportConfig:
    """run_dir: take its newest whole checkpoint. checkpoint: take this one instead. out: "" = <run_dir>/export.

    dtype: fp32 | bf16. tokenizer: "" = the run's own. shard_mb: largest weight file, unless one weight is
    larger.
    """

    run_dir: str = ""
    checkpoint: str = ""
    out: str = ""
    dtype: str = "fp32"
    tokenizer: str = ""
    shard_mb: int = 4096


def export(config: ExportConfig) -> Path:
    """Write the folder, whole or not at all; an earlier export there is replaced. Needs memory for one shard."""
    if config.dtype not in DTYPES:
        raise UserError(f"dtype={config.dtype} is not known: choose one of {', '.join(DTYPES)}")
    checkpoint = choose_checkpoint(config)
    saved = read_state(checkpoint)
    run_dir = checkpoint.parents[1]
    kept = run_dir if has_tokenizer(run_dir) else saved.state["config"]["data"]["tokenizer"]
    tokenizer = open_tokenizer(Path(config.tokenizer or kept), saved)
    out = Path(config.out) if config.out else run_dir / "export"
    check_replaceable(out)
    partial_out = out.with_name(out.name + ".partial")
    if partial_out.exists():
        shutil.rmtree(partial_out)
    partial_out.mkdir(parents=True)
    num_parameters = write_weights(partial_out, checkpoint, DTYPES[config.dtype], config.shard_mb << 20)
    write_json(partial_out / "config.json", package_config(saved, tokenizer, DTYPES[config.dtype]))
    for name, file in tokenizer.files.items():
        shutil.copyfile(file, partial_out / name)
    write_package(partial_out, saved, num_parameters, config.dtype)
    replace_folder(partial_out, out)
    print(
        f"exported step {saved.step} of {checkpoint} ({num_parameters:,} parameters, {config.dtype}) to {out}; "
        f"next: cd {out} && python -m {PACKAGE} caption IMAGE"
    )
    return out


def choose_checkpoint(config: ExportConfig) -> Path:
    """The checkpoint named, or the newest whole one of the run; every byte of it has been compared with its digest."""
    if config.checkpoint:
        damage = find_damage(Path(config.checkpoint))
        if damage:
            raise UserError(f"checkpoint={config.checkpoint} is not a whole checkpoint ({damage}): name another one")
        return Path(config.checkpoint).resolve()
    if not config.run_dir:
        raise UserError("there is nothing to export: give run_dir=DIR of a training run, or checkpoint=PATH")
    latest = find_latest(Path(config.run_dir))
    if latest is None:
        raise UserError(f"run_dir={config.run_dir} has no whole checkpoint: name a run that has saved one")
    return latest


def open_tokenizer(path: Path, saved: SavedState) -> Tokenizer:
    tokenizer = Tokenizer(path)
    if tokenizer.digest != saved.state["order"]["tokenizer"]:
        raise UserError(
            f"the tokenizer {path} is not the one that the model was trained with: give that one as tokenizer=PATH"
        )
    return tokenizer


def check_replaceable(out: Path) -> None:
    if out.exists() and not (out.is_dir() and (is_export(out) or not any(out.iterdir()))):
        raise UserError(f"out={out} exists and is not an export: choose another folder")


def is_export(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == MODEL_TYPE
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_weights(folder: Path, checkpoint: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    """Write the shards and their index; returns the number of parameters."""
    weights = tqdm(read_weights(checkpoint), desc="exporting", unit="weight", delay=5)
    converted = ((package_name(name), weight.to(dtype)) for name, weight in weights)
    shards: list[list[str]] = []
    num_parameters = 0
    for shard in in_shards(converted, shard_bytes):
        shards.append(list(shard))
        num_parameters += sum(weight.numel() for weight in shard.values())
        writes = [TensorToWrite(name, weight.shape, dtype, partial(list, [weight])) for name, weight in shard.items()]
        for _ in write_safetensors(folder / f"shard-{len(shards)}", writes, {"format": "pt"}):
            pass
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    total = {"total_size": num_parameters * dtype.itemsize}
    write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
    return num_parameters


def package_name(name: str) -> str:
    """The package holds the text head inside transformers' LlamaForCausalLM."""
    if name.startswith("language_model."):
        return "language_model.model." + name.removeprefix("language_model.")
    return name.replace("text_head.", "language_model.lm_head.")


def in_shards(weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive weights of at most `shard_bytes` together, or one that is larger."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        if shard and size + weight.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = weight
        size += weight.nbytes
    yield shard


def package_config(saved: SavedState, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """What emu_inference/config.py reads."""
    settings = saved.state["config"]
    sections = {
        name: {key: value for key, value in settings["model"][name].items() if key not in TRAINING_ONLY}
        for name in ("vision", "causal_transformer", "language_model")
    }
    language_model = settings["model"]["language_model"]
    sections["language_model"]["vocab_size"] = language_model["text_vocab_size"] + language_model["num_special_tokens"]
    return {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "step": saved.step,
        "dtype": str(dtype).removeprefix("torch."),
        **sections,
        "tokens": {name: getattr(tokenizer, name) for name in ("bos", "eos", "pad", "img_start", "img_end", "image")},
        "objective": settings["objective"],
    }


def write_package(folder: Path, saved: SavedState, num_parameters: int, dtype: str) -> None:
    """The code, how to install it, and how to use it."""
    (folder / PACKAGE).mkdir()
    own = (REPOSITORY / "inference" / PACKAGE).glob("*.py")
    for source in (*own, *(REPOSITORY / "models" / name for name in SHARED_FILES)):
        shutil.copyfile(source, folder / PACKAGE / source.name)
    template = REPOSITORY / "inference" / "template"
    shutil.copyfile(template / "pyproject.toml", folder / "pyproject.toml")
    model = saved.state["config"]["model"]
    readme = Template((template / "README.md").read_text(encoding="utf-8")).substitute(
        name=model["name"],
        step=saved.step,
        num_parameters=f"{num_parameters:,}",
        dtype=dtype,
        num_queries=model["causal_transformer"]["num_queries"],
        width=model["language_model"]["width"],
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def replace_folder(new: Path, out: Path) -> None:
    """Give `new` its final name; what was there is removed after that."""
    old = out.with_name(out.name + ".removed")
    if out.exists():
        out.rename(old)
    new.rename(out)
    if old.exists():
        shutil.rmtree(old)


def parse(arguments: list[str]) -> ExportConfig:
    """key=value settings, as in the other jobs. UserError on an unknown key or a wrong value."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export",
        description="Make a folder that holds a trained model and the code to use it.",
        epilog=f"{inspect.getdoc(ExportConfig)}\n\nexample: python -m trainer.export run_dir=outputs/demo/run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    keys = [field.name for field in fields(ExportConfig)]
    parser.add_argument("settings", nargs="+", metavar="key=value", help=f"keys: {', '.join(keys)}")
    settings: dict[str, Any] = {}
    for setting in parser.parse_args(arguments).settings:
        key, equals, value = setting.partition("=")
        if key not in keys or not equals:
            raise UserError(f"{setting!r} is not a setting: write key=value with a key of {', '.join(keys)}")
        settings[key] = value
    if not settings.get("shard_mb", "1").isdecimal() or settings.get("shard_mb") == "0":
        raise UserError(f"shard_mb={settings['shard_mb']} is not a size: give whole megabytes, at least 1")
    return ExportConfig(**settings | {"shard_mb": int(settings.get("shard_mb", ExportConfig.shard_mb))})


def main() -> None:
    export(parse(sys.argv[1:]))


if __name__ == "__main__":
    run_cli(main)
