"""Weights in other people's layouts: `python -m models.weights.export_ --help`.

llama: <out>/config.json, model.safetensors: the language model alone, as transformers' LlamaForCausalLM reads it.
emu:   <out>/pytorch_model.bin: all of the model, as the released Emu's code reads it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from conf import UserError, run_cli
from models.config import LanguageModelConfig
from models.language_model import rotary_frequencies
from models.weights.description import DESCRIPTION, read_description
from models.weights.fragment_files import WEIGHT, FragmentReader, write_json
from models.weights.fragments import whole
from models.weights.layouts import Part, Shape, causal_transformer_part, language_model_part, vision_part
from models.weights.tensor_files import TensorToWrite, open_to_write, write_safetensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMU_PARTS = (
    vision_part("visual.", with_ln_visual=True),
    causal_transformer_part("cformer."),
    language_model_part("decoder.lm.model."),
)
EMU_HEADS = {
    "text_head.weight": "decoder.lm.lm_head.weight",
    "regression_head.weight": "decoder.lm.stu_regress_head.weight",
}
TOWER_OUTPUTS, T5_VOCABULARY = 1024, 32128
"""Sizes of two tables that the released model has and does not use; its loader asks for them."""


def language_model_settings(folder: Path) -> LanguageModelConfig:
    """Of a run's checkpoint, or of a folder that the import made and whose settings are complete."""
    try:
        if (folder / DESCRIPTION).is_file():
            found = read_description(folder)["model"]["language_model"]
        else:
            found = json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"]["config"]["model"][
                "language_model"
            ]
        return LanguageModelConfig(**found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is neither a checkpoint nor a folder of imported weights of a language model ({error!r}): name "
            "RUN/checkpoints/step-N"
        ) from error


def export_llama(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """The language model with all rows of its vocabulary, the special tokens' included."""
    reader, config = FragmentReader(folder), language_model_settings(folder)
    names = {f"language_model.{name}": f"model.{name}" for name in _names(reader, "language_model.")}
    file = out / "model.safetensors"
    _write(reader, names | {"text_head.weight": "lm_head.weight"}, file, dtype)
    write_json(out / "config.json", llama_config(config, dtype))
    return out


def llama_config(config: LanguageModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json with RoPE as both transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) read it."""
    rope: dict[str, Any] = {"rope_type": config.rope_scaling.replace("none", "default")}
    if config.rope_scaling != "none":
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low_frequency_factor,
            "high_freq_factor": config.rope_high_frequency_factor,
            "original_max_position_embeddings": config.rope_original_positions,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.width_of_head,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_base,
        "rope_scaling": None if config.rope_scaling == "none" else rope,
        "rope_parameters": {"rope_theta": config.rope_base, **rope},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": config.text_vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def export_emu(folder: Path, out: Path, dtype: torch.dtype, with_inv_freq: bool) -> Path:
    """The released layout, with what it holds and does not use: norm and head of the tower, T5's table of tokens."""
    reader, config = FragmentReader(folder), language_model_settings(folder)
    names = {ours: theirs for part in EMU_PARTS for ours, theirs in _part_names(reader, part).items()} | EMU_HEADS
    absent = sorted(names.keys() - reader.shapes().keys())
    if absent:
        raise UserError(f"{folder} lacks {absent[0]}: the released layout is that of a whole Emu")
    width, t5_width = reader.shapes()["vision_encoder.cls_token"][-1], reader.shapes()["causal_transformer.queries"][-1]
    unused: dict[str, Callable[[], Tensor]] = {
        "visual.norm.weight": partial(torch.ones, width),
        "visual.norm.bias": partial(torch.zeros, width),
        "visual.head.weight": partial(torch.zeros, TOWER_OUTPUTS, width),
        "visual.head.bias": partial(torch.zeros, TOWER_OUTPUTS),
        "cformer.cformer.embed_tokens.weight": partial(torch.zeros, T5_VOCABULARY, t5_width),
    }
    if with_inv_freq:
        for layer in range(config.num_layers):
            name = f"decoder.lm.model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            unused[name] = partial(rotary_frequencies, config)
    mapped = out / "weights.partial"
    _write(reader, names, mapped, dtype)
    with safe_open(mapped, framework="pt") as file:  # mapped into memory, not read into it, while torch writes it out
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        state |= {name: make().to(dtype) for name, make in unused.items()}
        with open_to_write(out / "pytorch_model.bin") as whole_file:
            torch.save(state, whole_file)
    mapped.unlink()
    return out / "pytorch_model.bin"


def _names(reader: FragmentReader, prefix: str) -> list[str]:
    found = [name.removeprefix(prefix) for name in reader.shapes() if name.startswith(prefix)]
    if not found:
        raise UserError(f"{reader.folder} holds nothing of {prefix.rstrip('.')}: name a checkpoint that does")
    return found


def _part_names(reader: FragmentReader, part: Part) -> dict[str, str]:
    return {part.prefix + name: part.foreign(name) for name in _names(reader, part.prefix)}


def _write(reader: FragmentReader, names: dict[str, str], file: Path, dtype: torch.dtype) -> None:
    """One weight after another: memory stays near the largest."""
    shapes = reader.shapes()
    writes = [
        TensorToWrite(theirs, shapes[ours], dtype, partial(_pieces, reader, ours, shapes[ours], dtype))
        for ours, theirs in names.items()
    ]
    written = write_safetensors(file, writes, {"format": "pt"})
    for _ in tqdm(written, total=len(writes), desc="exporting", unit="weight", delay=5):
        pass


def _pieces(reader: FragmentReader, name: str, shape: Shape, dtype: torch.dtype) -> Iterable[Tensor]:
    yield reader.read(whole(name, shape), WEIGHT).to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.weights.export_",
        description="Write the weights of a checkpoint in a layout that other code reads.",
        epilog="example: python -m models.weights.export_ RUN/checkpoints/step-00010000 --layout llama --out llama",
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step-N, or a folder of imported weights")
    parser.add_argument("--layout", choices=("llama", "emu"), required=True, help="whose layout")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (default %(default)s)")
    parser.add_argument(
        "--no-inv-freq",
        action="store_true",
        help="emu: leave out RoPE's tables, which transformers up to 4.31 asks for and later versions refuse",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists: name another folder, or remove it")
    partial_out = arguments.out.with_name(arguments.out.name + ".partial")
    partial_out.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[arguments.dtype]
    if arguments.layout == "llama":
        export_llama(arguments.checkpoint, partial_out, dtype)
        follow_up = f"transformers.AutoModelForCausalLM.from_pretrained({str(arguments.out)!r})"
    else:
        export_emu(arguments.checkpoint, partial_out, dtype, not arguments.no_inv_freq)
        follow_up = f"give {arguments.out}/pytorch_model.bin to Emu's own code as --ckpt-path"
    partial_out.rename(arguments.out)
    print(f"exported {arguments.checkpoint} as {arguments.layout} ({arguments.dtype}) to {arguments.out}; {follow_up}")


if __name__ == "__main__":
    run_cli(main)
