"""Sizes of the model (`conf/model/`) and options of the objective (`conf/objective/`). No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

CHUNK_LOGITS = 1 << 24
"""Logits that the text head holds at a time: 64 MiB in fp32."""


@dataclass
class VisionConfig:
    """EVA-01-CLIP-g/14 as in the released configuration. pixel_mean, pixel_std: OpenAI CLIP's, for pixels in [0, 1]."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    num_layers: int = 40
    num_heads: int = 16
    mlp_width: int = 6144
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class CausalTransformerConfig:
    """T5-base decoder shape; num_queries embeddings an image.

    dropout: the paper's T5 has 0.1; 0 here, for with dropout the targets are random and the loss depends on the split.
    """

    num_queries: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    head_width: int = 64
    mlp_width: int = 3072
    position_buckets: int = 32
    position_max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.0


@dataclass
class LanguageModelConfig:
    """LLaMA family: LLaMA 1 to 3 and Mistral.

    text_vocab_size: pieces of the tokenizer, 0 = what data.tokenizer has. num_special_tokens: rows that follow them:
    [PAD], [IMG], [/IMG] and <image>; the released instruct model has 2 more. head_width: 0 = width / num_heads.
    rope_scaling: none | linear | llama3 (Hugging Face's names; the following four are its numbers).
    attention: kernel of the packed rows: varlen (torch's flash attention) | flash_attn (that of the package flash-attn)
    | sdpa | auto: the first of these that runs with this device, precision and head width. They agree up to rounding.
    """

    text_vocab_size: int = 32000
    num_special_tokens: int = 4
    width: int = 5120
    num_layers: int = 40
    num_heads: int = 40
    num_kv_heads: int = 40
    head_width: int = 0
    mlp_width: int = 13824
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_positions: int = 8192
    max_positions: int = 2048
    init_std: float = 0.02
    attention: str = "auto"

    @property
    def vocabulary(self) -> int:
        return self.text_vocab_size + self.num_special_tokens

    @property
    def width_of_head(self) -> int:
        return self.head_width or self.width // self.num_heads

    @property
    def residual_std(self) -> float:
        """Start of the projections that write into the residual stream: GPT-2's 1 / sqrt(2 x layers)."""
        return self.init_std / math.sqrt(2 * self.num_layers)


@dataclass
class ModelConfig:
    name: str = MISSING
    vision: VisionConfig = field(default_factory=VisionConfig)
    causal_transformer: CausalTransformerConfig = field(default_factory=CausalTransformerConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)


@dataclass
class ObjectiveConfig:
    """Choices that the paper leaves open, each with its default.

    text_weight, image_weight: factors of the two losses. image_weight_warmup_steps: image_weight rises linearly from 0.
    image_weight_delay_steps: it stays 0 so long before (captioning first).
    target_normalisation: none | variance (squared error over the running variance of the targets across images).
    regression_gradient: full (the paper: into the encoder through the inputs too) | text_only (the encoder learns from
    the text loss alone).
    """

    text_weight: float = 1.0
    image_weight: float = 1.0
    image_weight_delay_steps: int = 0
    image_weight_warmup_steps: int = 0
    target_normalisation: str = "none"
    regression_gradient: str = "full"
