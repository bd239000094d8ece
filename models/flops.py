"""Floating-point operations of a forward pass in closed form; a training step takes three times as many. No torch here.

A multiplication and an addition count as two operations. Only matrix products count, and of causal attention the half
that is used, so that the utilisation of a device that is computed with these figures is never flattered.
"""

from __future__ import annotations

from collections.abc import Iterable

from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig, VisionConfig


def vision_encoder_flops(config: VisionConfig) -> int:
    """Of one image."""
    patches = (config.image_size // config.patch_size) ** 2
    tokens, width = patches + 1, config.width
    weights = 4 * width * width + 2 * width * config.mlp_width
    attention = 2 * tokens * width
    embedding = patches * 3 * config.patch_size**2 * width
    return 2 * (config.num_layers * tokens * (weights + attention) + embedding)


def causal_transformer_flops(config: CausalTransformerConfig, vision: VisionConfig, output_width: int) -> int:
    """Of one image."""
    queries, inner = config.num_queries, config.num_heads * config.head_width
    vision_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    weights = 6 * config.width * inner + 2 * config.width * config.mlp_width
    attention = inner * queries + 2 * inner * vision_tokens
    keys_and_values = 2 * vision_tokens * vision.width * inner
    layer = queries * (weights + attention) + keys_and_values
    return 2 * (config.num_layers * layer + queries * config.width * output_width)


def language_model_flops(config: LanguageModelConfig, document_lengths: Iterable[int]) -> int:
    """Of packed documents, without the heads."""
    query_width, kv_width = config.num_heads * config.width_of_head, config.num_kv_heads * config.width_of_head
    weights = config.width * (2 * query_width + 2 * kv_width + 3 * config.mlp_width)
    return 2 * config.num_layers * sum(length * (weights + length * query_width) for length in document_lengths)


def forward_flops(
    config: ModelConfig,
    document_lengths: Iterable[int],
    num_images: int,
    num_text_targets: int,
    num_image_targets: int,
) -> int:
    """Of a batch: real positions only, heads at positions with a target."""
    language = config.language_model
    image = vision_encoder_flops(config.vision)
    image += causal_transformer_flops(config.causal_transformer, config.vision, language.width)
    heads = 2 * language.width * (num_text_targets * language.vocabulary + num_image_targets * language.width)
    return num_images * image + language_model_flops(language, document_lengths) + heads
