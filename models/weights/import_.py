"""Other people's weights become the start of a run: `python -m models.weights.import_ --help`.

<out>/fragments-00000.safetensors, fragments-00000.json   weights, in the format of checkpoints, as precise as they came
<out>/weights.json                                         what they were made from, and the sizes of the model
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from conf import UserError, run_cli
from models.weights.description import DESCRIPTION, FORMAT
from models.weights.eva_clip import open_tower
from models.weights.fragment_files import WEIGHT, fragment_key, write_json
from models.weights.fragments import whole
from models.weights.layouts import Part, Tensors, causal_transformer_part, language_model_part, vision_part
from models.weights.llama_config import read_llama_config
from models.weights.tensor_files import StoredTensor, TensorToWrite, open_tensors, write_safetensors

NUM_SPECIAL_TOKENS, NUM_INSTRUCT_TOKENS = 4, 6
"""[PAD], [IMG], [/IMG], <image>; the released instruct model adds [USER] and [ASSISTANT]."""
IGNORED_LLAMA = re.compile(r".*rotary_emb\.inv_freq$")
IGNORED_EMU = re.compile(r"visual\.(norm|head)\.|cformer\.cformer\.embed_tokens\.|.*rotary_emb\.inv_freq$")
LORA = re.compile(r"(.*)\.lora_([AB])\.default\.weight$")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
LORA_SCALE = 1.0
"""alpha / r of the released instruct model: 16 / 16."""


@dataclass
class Imported:
    """What is to be written, and what was found wrong on the way.

    sizes: settings by section of conf/model. fresh: parameters of an imported part that its file does not have.
    """

    writes: dict[str, TensorToWrite] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    prefixes: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def import_vision(path: Path) -> Imported:
    """The tower of an EVA-CLIP file; its text tower, final norm and head have no place in Emu."""
    rest, prefix = open_tower(path)
    imported = Imported(fresh=["vision_encoder.ln_visual.weight", "vision_encoder.ln_visual.bias"])
    _take_part(imported, rest, vision_part(prefix, with_ln_visual=False))
    _refuse(path, imported, list(rest))
    return imported


def import_language_model(path: Path, num_special: int) -> Imported:
    """A Hugging Face LLaMA-family folder (or file). Rows of the special tokens are the mean of the others."""
    tensors = {name: tensor for name, tensor in open_tensors(path).items() if not IGNORED_LLAMA.match(name)}
    imported, rest = Imported(), dict(tensors)
    _take_part(imported, rest, language_model_part("model."))
    head = "lm_head.weight"
    if head not in rest and "model.embed_tokens.weight" in tensors:  # tied: one table is both
        rest[head] = tensors["model.embed_tokens.weight"]
    _take(imported, rest, head, "text_head.weight")
    _refuse(path, imported, list(rest))
    sizes = imported.sizes["language_model"]
    for name in ("language_model.embed_tokens.weight", "text_head.weight"):
        imported.writes[name] = _with_mean_rows(imported.writes[name], num_special)
    told = read_llama_config(path) if path.is_dir() else {}
    _check_told(path, sizes, told)
    imported.sizes["language_model"] = _language_model_sizes(sizes, sizes["vocabulary"], num_special) | told
    return imported


def import_emu(path: Path, num_special: int | None) -> Imported:
    """A released Emu checkpoint, pretrained or instruct; LoRA of either layout of PEFT is merged into its matrices."""
    tensors = open_tensors(path)
    if num_special is None:
        is_instruct = any(".lora_" in name for name in tensors)
        num_special = NUM_INSTRUCT_TOKENS if is_instruct else NUM_SPECIAL_TOKENS
    imported, rest = Imported(), _merge_lora(path, tensors)
    _take_part(imported, rest, vision_part("visual.", with_ln_visual=True))
    _take_part(imported, rest, causal_transformer_part("cformer."))
    _take_part(imported, rest, language_model_part("decoder.lm.model."))
    _take(imported, rest, "decoder.lm.lm_head.weight", "text_head.weight")
    _take(imported, rest, "decoder.lm.stu_regress_head.weight", "regression_head.weight")
    _refuse(path, imported, [name for name in rest if not IGNORED_EMU.match(name)])
    sizes = imported.sizes["language_model"]
    causal = imported.sizes["causal_transformer"]
    fits = {
        "vision_width": (causal.pop("vision_width"), imported.sizes["vision"]["width"]),
        "output_width": (causal.pop("output_width"), sizes["width"]),
    }
    wrong = [f"{name} {ours} for {theirs}" for name, (ours, theirs) in fits.items() if ours != theirs]
    if wrong:
        raise UserError(f"the parts of {path} do not fit each other ({', '.join(wrong)}): give another file")
    text_vocabulary = sizes["vocabulary"] - num_special
    imported.sizes["language_model"] = _language_model_sizes(sizes, text_vocabulary, num_special)
    return imported


def _take_part(imported: Imported, rest: Tensors, part: Part) -> None:
    """Move a part's tensors from `rest` to `imported`, after a look at all names and shapes."""
    num_layers = part.num_layers(rest)
    names = part.names(max(1, num_layers))
    missing = [part.foreign(name) for name in names if part.foreign(name) not in rest]
    imported.problems += [f"{name} is missing" for name in missing]
    if not missing:
        try:
            sizes = part.sizes(lambda name: rest[part.foreign(name)].shape, num_layers)
            shapes = part.shapes(sizes)
        except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
            imported.problems.append(f"the shapes of {part.section} make no sense ({error})")
        else:
            imported.sizes[part.section] = sizes
            imported.problems += [
                f"{part.foreign(name)} has shape {list(rest[part.foreign(name)].shape)} and not {list(shapes[name])}"
                for name in names
                if rest[part.foreign(name)].shape != shapes[name]
            ]
    imported.prefixes.append(part.prefix)
    for name in names:
        tensor = rest.pop(part.foreign(name), None)
        if tensor is not None:
            _add(imported, part.prefix + name, tensor)


def _take(imported: Imported, rest: Tensors, foreign: str, name: str) -> None:
    """One of the heads: as wide as the embedding table, whose sizes are known by now if anything is right."""
    imported.prefixes.append(name)
    tensor = rest.pop(foreign, None)
    sizes = imported.sizes.get("language_model")
    if tensor is None:
        imported.problems.append(f"{foreign} is missing")
        return
    if sizes:
        wanted = (sizes["vocabulary" if name == "text_head.weight" else "width"], sizes["width"])
        if tensor.shape != wanted:
            imported.problems.append(f"{foreign} has shape {list(tensor.shape)} and not {list(wanted)}")
    _add(imported, name, tensor)


def _add(imported: Imported, name: str, tensor: StoredTensor) -> None:
    imported.writes[name] = TensorToWrite(name, tensor.shape, tensor.dtype, lambda: [tensor.load()])


def _refuse(path: Path, imported: Imported, unknown: list[str]) -> None:
    problems = imported.problems + [f"{name} is unknown" for name in unknown]
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(
            f"{path} is not the checkpoint that was expected ({'; '.join(problems[:12])}{more}): give a complete one "
            "of this kind"
        )


def _with_mean_rows(table: TensorToWrite, count: int) -> TensorToWrite:
    """A table of tokens with `count` further rows, each the mean of the others, as Emu's own code has it."""

    def pieces() -> Iterable[Tensor]:
        for piece in table.pieces():
            yield piece
            yield piece.mean(dim=0, dtype=torch.float32).to(table.dtype).expand(count, -1)

    return TensorToWrite(table.name, (table.shape[0] + count, table.shape[1]), table.dtype, pieces)


def _merge_lora(path: Path, tensors: Tensors) -> Tensors:
    """Names as without PEFT (base_layer is where its later versions keep the matrix); adapted matrices in fp32."""
    plain = {
        name.replace("decoder.lm.base_model.model.", "decoder.lm.").replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
    }
    adapters = {match[1]: match for name in plain if (match := LORA.match(name))}
    for target in adapters:
        a, b = (plain.pop(f"{target}.lora_{which}.default.weight", None) for which in "AB")
        base = plain.get(f"{target}.weight")
        if a is None or b is None or base is None:
            raise UserError(f"{path} has only a part of the LoRA of {target}: give a complete checkpoint")
        if len(a.shape) != 2 or len(b.shape) != 2 or (b.shape[0], a.shape[1]) != base.shape or a.shape[0] != b.shape[1]:
            raise UserError(f"the LoRA of {target} in {path} does not fit its matrix: give another checkpoint")
        plain[f"{target}.weight"] = StoredTensor(base.shape, torch.float32, partial(_merged, base, a, b))
    return plain


def _merged(base: StoredTensor, a: StoredTensor, b: StoredTensor) -> Tensor:
    return torch.addmm(base.load().float(), b.load().float(), a.load().float(), alpha=LORA_SCALE)


def _language_model_sizes(sizes: dict[str, Any], text_vocabulary: int, num_special: int) -> dict[str, Any]:
    """What the shapes tell; heads, RoPE and the norms' epsilon are in no shape."""
    seen = {name: sizes[name] for name in ("width", "num_layers", "mlp_width")}
    return {"text_vocab_size": text_vocabulary, "num_special_tokens": num_special, **seen}


def _check_told(path: Path, sizes: dict[str, Any], told: dict[str, Any]) -> None:
    """Raises UserError where config.json says something else than the shapes."""
    if not told:
        return
    expected = {
        "query_width": told["num_heads"] * told["head_width"],
        "key_width": told["num_kv_heads"] * told["head_width"],
        **{name: told[name] for name in ("width", "num_layers", "mlp_width")},
    }
    wrong = [f"{name} {value} for {sizes[name]}" for name, value in expected.items() if value != sizes[name]]
    if wrong:
        raise UserError(
            f"{path / 'config.json'} does not describe the weights beside it ({', '.join(wrong)}): download both again"
        )


def write_imported(out: Path, parts: list[Imported], made_from: dict[str, str]) -> int:
    """Write the folder, whole or not at all; returns the number of parameters. Memory stays near the largest tensor."""
    if out.exists():
        raise UserError(f"{out} exists: name another folder, or remove it")
    writes = {name: tensor for part in parts for name, tensor in part.writes.items()}
    partial_out = out.with_name(out.name + ".partial")
    partial_out.mkdir(parents=True, exist_ok=True)
    fragments = [whole(name, tensor.shape) for name, tensor in writes.items()]
    flat = [
        TensorToWrite(fragment_key(name, WEIGHT), (torch.Size(tensor.shape).numel(),), tensor.dtype, tensor.pieces)
        for name, tensor in writes.items()
    ]
    written = write_safetensors(partial_out / "fragments-00000.safetensors", flat, {"format": "pt"})
    for _ in tqdm(written, total=len(flat), desc="importing", unit="weight", delay=5):
        pass
    entries = [vars(fragment) | {"tensors": [WEIGHT], "num_updates": 0} for fragment in fragments]
    write_json(partial_out / "fragments-00000.json", {"fragments": entries})
    description = {
        "format": FORMAT,
        "made_from": made_from,
        "model": {section: sizes for part in parts for section, sizes in part.sizes.items()},
        "prefixes": [prefix for part in parts for prefix in part.prefixes],
        "fresh": [name for part in parts for name in part.fresh],
    }
    write_json(partial_out / DESCRIPTION, description)
    partial_out.rename(out)
    return sum(torch.Size(tensor.shape).numel() for tensor in writes.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.weights.import_",
        description="Make the start of a run (init.weights=DIR) from other people's weights.",
        epilog="example: python -m models.weights.import_ --language-model llama-13b --vision EVA01_CLIP_g_14.pt "
        "--out outputs/start",
    )
    parser.add_argument(
        "--language-model",
        type=Path,
        metavar="DIR",
        help="Hugging Face folder of a LLaMA or Mistral; the run takes its tokenizer from there as well: "
        "data.tokenizer=DIR",
    )
    parser.add_argument("--vision", type=Path, metavar="FILE", help="EVA-CLIP checkpoint (.pt or .safetensors)")
    parser.add_argument(
        "--emu",
        type=Path,
        metavar="PATH",
        help="released Emu checkpoint, pretrained or instruct; its tokenizer is LLaMA's tokenizer.model",
    )
    parser.add_argument(
        "--special-tokens",
        type=int,
        metavar="N",
        help="rows of the vocabulary behind the text: 4, and 6 for an instruct checkpoint with its LoRA, by default",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    arguments = parser.parse_args()
    if not (arguments.language_model or arguments.vision or arguments.emu):
        raise UserError("there is nothing to import: give --language-model, --vision or --emu")
    if arguments.emu and (arguments.language_model or arguments.vision):
        raise UserError("--emu holds all parts of the model: give it alone")
    return arguments


def tokenizer_of(language_model: Path | None) -> str:
    """What data.tokenizer is to be: the language model's folder, if it holds one."""
    if language_model and any((language_model / name).is_file() for name in TOKENIZER_FILES):
        return str(language_model)
    return "ITS_TOKENIZER"


def main() -> None:
    arguments = parse()
    parts, made_from = [], {}
    for name in ("language_model", "vision", "emu"):
        path = getattr(arguments, name)
        if path is None:
            continue
        if not path.exists():
            raise UserError(f"--{name.replace('_', '-')} {path} does not exist: give a file or a folder of weights")
        made_from[name] = str(path.absolute())
        if name == "vision":
            parts.append(import_vision(path))
        elif name == "language_model":
            parts.append(import_language_model(path, arguments.special_tokens or NUM_SPECIAL_TOKENS))
        else:
            parts.append(import_emu(path, arguments.special_tokens))
    num_parameters = write_imported(arguments.out, parts, made_from)
    settings = " ".join(
        f"model.{section}.{name}={value}" for part in parts for section, sizes in part.sizes.items()
        for name, value in sizes.items()
    )  # fmt: skip
    print(f"imported {num_parameters:,} parameters to {arguments.out}; the model is: {settings}")
    tokenizer = f" data.tokenizer={tokenizer_of(arguments.language_model)}" if made_from.keys() != {"vision"} else ""
    run = f"python -m trainer.pretrain init.weights={arguments.out}{tokenizer}"
    print(f"next: {run} and those settings, or a preset that has them")


if __name__ == "__main__":
    run_cli(main)
