"""The config.json of a Hugging Face LLaMA-family folder, as settings of `conf/model`'s language_model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf import UserError

KNOWN_TYPES = ("llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3")


def read_llama_config(folder: Path) -> dict[str, Any]:
    """Settings of LanguageModelConfig by name; {} without a config.json.

    Raises UserError for another architecture, or a RoPE scaling that this model does not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("model_type") not in KNOWN_TYPES or content.get("hidden_act", "silu") != "silu":
            raise UserError(
                f"{path} describes a model of type {content.get('model_type')!r}: give one of LLaMA's architecture "
                f"({', '.join(KNOWN_TYPES)})"
            )
        num_heads = int(content["num_attention_heads"])
        width = int(content["hidden_size"])
        return {
            "width": width,
            "num_layers": int(content["num_hidden_layers"]),
            "num_heads": num_heads,
            "num_kv_heads": int(content.get("num_key_value_heads") or num_heads),
            "head_width": int(content.get("head_dim") or width // num_heads),
            "mlp_width": int(content["intermediate_size"]),
            "norm_eps": float(content["rms_norm_eps"]),
            "max_positions": int(content.get("max_position_embeddings", 2048)),
            **_rope(content, path),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no configuration of a LLaMA model ({error!r}): download it again") from error


def _rope(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """transformers 5 keeps all of RoPE in `rope_parameters`, earlier ones in `rope_theta` and `rope_scaling`."""
    rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{path} asks for RoPE scaling {kind!r}, which this model does not have: give a model with one of "
            f"{', '.join(ROPE_TYPES)}"
        )
    settings: dict[str, Any] = {"rope_base": float(rope.get("rope_theta", content.get("rope_theta", 10000.0)))}
    if kind != "default":
        settings |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        settings |= {
            "rope_low_frequency_factor": float(rope["low_freq_factor"]),
            "rope_high_frequency_factor": float(rope["high_freq_factor"]),
            "rope_original_positions": int(rope["original_max_position_embeddings"]),
        }
    return settings
