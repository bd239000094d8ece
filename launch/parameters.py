"""How many parameters each part of the network has, in closed form."""

from __future__ import annotations

from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig, VisionConfig


def count_vision_encoder(config: VisionConfig) -> int:
    """Patch embedding, class token, positions, blocks (query and value biases, no key bias) and `ln_visual`."""
    width, mlp = config.width, config.mlp_width
    num_patches = (config.image_size // config.patch_size) ** 2
    embeddings = 3 * config.patch_size**2 * width + width + width + (1 + num_patches) * width
    attention = 3 * width * width + 2 * width + width * width + width
    block = attention + 2 * width * mlp + mlp + width + 4 * width
    return embeddings + config.num_layers * block + 2 * width


def count_causal_transformer(config: CausalTransformerConfig, vision_width: int, output_width: int) -> int:
    """T5 decoder blocks (no biases, three norms), one table of relative positions, queries and the projection."""
    width, inner = config.width, config.num_heads * config.head_width
    self_attention = 4 * width * inner
    cross_attention = 2 * width * inner + 2 * vision_width * inner
    block = self_attention + cross_attention + 2 * width * config.mlp_width + 3 * width
    tables = config.num_queries * width + config.position_buckets * config.num_heads
    return config.num_layers * block + tables + width + width * output_width + output_width


def count_language_model(config: LanguageModelConfig) -> int:
    """LLaMA with untied input and output embeddings."""
    width = config.width
    query_width, kv_width = config.num_heads * config.width_of_head, config.num_kv_heads * config.width_of_head
    layer = 2 * width * query_width + 2 * width * kv_width + 3 * width * config.mlp_width + 2 * width
    vocabulary = config.vocabulary
    return config.num_layers * layer + width + 2 * vocabulary * width


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part of the network."""
    width = model.language_model.width
    return {
        "vision encoder": count_vision_encoder(model.vision),
        "causal transformer": count_causal_transformer(model.causal_transformer, model.vision.width, width),
        "language model": count_language_model(model.language_model),
        "regression head": width * width,
    }
