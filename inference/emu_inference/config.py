"""What `config.json` of an exported model says: sizes, token ids, pixel constants."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1
MODEL_TYPE = "emu"
CONFIG_FILE = "config.json"


class UserError(Exception):
    """Wrong input. The message is one sentence: what is wrong, where, and how to mend it."""


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision encoder; pixel_mean, pixel_std: of pixels in [0, 1], per channel."""

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


@dataclass(frozen=True)
class CausalTransformerConfig:
    """num_queries: N, the visual embeddings of an image."""

    num_queries: int
    width: int
    num_layers: int
    num_heads: int
    head_width: int
    mlp_width: int
    position_buckets: int
    position_max_distance: int
    norm_eps: float


@dataclass(frozen=True)
class LanguageModelConfig:
    """LLaMA. vocab_size: pieces of the tokenizer and the special tokens. head_width: 0 = width / num_heads.

    rope_scaling: none | linear | llama3, by rope_factor and, for llama3, the three numbers behind it.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    norm_eps: float
    rope_base: float
    max_positions: int
    head_width: int = 0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_positions: int = 8192


@dataclass(frozen=True)
class TokenIds:
    """`<s>`, `</s>`, `[PAD]`, `[IMG]`, `[/IMG]` and `<image>`, the slot of one visual embedding."""

    bos: int
    eos: int
    pad: int
    img_start: int
    img_end: int
    image: int


@dataclass(frozen=True)
class EmuConfig:
    """step: training steps behind the weights. dtype: how they are stored. objective: what they were trained on."""

    step: int
    dtype: str
    vision: VisionConfig
    causal_transformer: CausalTransformerConfig
    language_model: LanguageModelConfig
    tokens: TokenIds
    objective: dict[str, Any]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> EmuConfig:
        """Read config.json of an exported folder. UserError if there is none, or one that this version cannot read."""
        path = Path(folder) / CONFIG_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = (content.pop("model_type"), content.pop("format"))
        except OSError as error:
            raise UserError(f"{folder} holds no exported model ({CONFIG_FILE}: {error.strerror}): name one") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the configuration of an exported Emu: export the model again") from error
        if found != (MODEL_TYPE, FORMAT):
            raise UserError(
                f"{path} describes a model of type {found[0]} and format {found[1]}, and this package reads "
                f"{MODEL_TYPE} {FORMAT}: use the package that lies beside it"
            )
        try:
            return cls(**{name: _section(name, value) for name, value in content.items()})
        except TypeError as error:
            raise UserError(f"{path} lacks or exceeds what this package knows ({error}): export again") from error


SECTIONS = {
    "vision": VisionConfig,
    "causal_transformer": CausalTransformerConfig,
    "language_model": LanguageModelConfig,
    "tokens": TokenIds,
}


def _section(name: str, value: Any) -> Any:
    return SECTIONS[name](**value) if name in SECTIONS else value


def sizes(section: Any) -> dict[str, Any]:
    """Arguments of the module that a section describes."""
    return {f.name: getattr(section, f.name) for f in fields(section) if not f.name.startswith("pixel_")}
