"""What a forward pass keeps for the backward pass, in closed form: every term names the tensors it counts.

Read off `models/`: a tensor that two operations save is counted once. T positions of the language model, W its width,
H heads and K key-value heads of D, F its feed-forward; m images of P vision tokens and N queries on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import CHUNK_LOGITS, CausalTransformerConfig, LanguageModelConfig, ModelConfig, VisionConfig

FP32 = 4
INDEX = 8


@dataclass(frozen=True)
class MicroBatch:
    """What a data-parallel rank puts through the model at once; rows are full."""

    rows: int
    seq_len: int
    images: int
    text_targets: int


@dataclass(frozen=True)
class Numerics:
    """How activations are kept. width: bytes of a number (bf16 2, fp32 4).

    recompute: none | selective | full (models/recompute.py). fused_norms: CUDA's RMSNorm saves its input and one number
    a position; elsewhere it is composed of operations in fp32 that save their input and the normalised one.
    varlen: the rows' attention runs where they lie (CUDA in bf16), else on copies by document.
    """

    width: int
    recompute: str
    fused_norms: bool
    varlen: bool

    def rms_norm(self, positions: float, size: int) -> float:
        """What nn.RMSNorm saves; the input is the residual stream, which nothing else saves."""
        saved = self.width * size if self.fused_norms else 2 * FP32 * size
        return positions * (saved + FP32)


@dataclass(frozen=True)
class Saved:
    """Bytes that a part of the network keeps for its backward pass, and what is beside them at that pass's fullest."""

    kept: float
    workspace: float


def language_model(config: LanguageModelConfig, positions: int, tp: int, sequence: bool, how: Numerics) -> Saved:
    own = positions / (tp if sequence else 1)
    heads, kv_heads = config.num_heads * config.width_of_head / tp, config.num_kv_heads * config.width_of_head / tp
    mlp = config.mlp_width / tp
    a = how.width
    # Two norms; their outputs, which query, key, value, and gate, up projections read whole.
    layer = 2 * how.rms_norm(own, config.width) + 2 * positions * a * config.width
    qkv = heads + 2 * kv_heads
    layer += positions * a * (qkv + heads)  # with what the output projection reads
    layer += positions * a * 3 * mlp  # gate, up, and what the down projection reads
    # SiLU of the gate, and log-sum-exp. Copies by document have a key and value for every query head, and a result.
    copies = 0 if how.varlen else 3 * heads - qkv + heads
    again = positions * (a * (mlp + copies) + FP32 * config.num_heads / tp)
    kept = {"none": layer + again, "selective": layer, "full": a * own * config.width}[how.recompute]
    # Gradients of the residual stream, and of the feed-forward's product, gate and up, less the product, then free.
    workspace = positions * a * (config.width + 2 * mlp)
    workspace += {"none": 0.0, "selective": 2 * positions * a * mlp, "full": layer + again}[how.recompute]
    tables = positions * (2 * FP32 * config.width_of_head + 2 * INDEX)  # cos, sin; order of the documents
    last_norm = how.rms_norm(own, config.width) + positions * a * config.width
    return Saved(config.num_layers * kept + last_norm + tables, workspace)


def vision_encoder(config: VisionConfig, images: float, how: Numerics) -> Saved:
    a, width = how.width, config.width
    tokens = images * num_tokens(config)
    # Two LayerNorms (input, output, mean and deviation); query, key and value; attention's result, log-sum-exp.
    block = tokens * (2 * (2 * a * width + 2 * FP32) + 3 * a * width + a * width + FP32 * config.num_heads)
    block += tokens * a * 2 * config.mlp_width  # before and after GELU
    kept = a * tokens * width if how.recompute == "full" else block
    workspace = tokens * a * (width + config.mlp_width) + (block if how.recompute == "full" else 0)
    pixels = images * 3 * config.image_size**2 * (1 + a)  # as they came, and normalised
    last_norm = tokens * (2 * a * width + 2 * FP32)
    return Saved(config.num_layers * kept + pixels + last_norm, workspace)


def causal_transformer(
    config: CausalTransformerConfig, vision: VisionConfig, output_width: int, images: float, how: Numerics
) -> Saved:
    a, inner = how.width, config.num_heads * config.head_width
    queries = images * config.num_queries
    norms = 3 * (how.rms_norm(queries, config.width) + queries * a * config.width)
    # Self-attention has a bias with a gradient, so no flash kernel: q, k, v in fp32, probabilities, the result.
    own = queries * (3 * FP32 * inner + FP32 * config.num_heads * config.num_queries + a * inner)
    # Cross-attention: keys and values of all vision tokens; queries, result, log-sum-exp.
    cross = images * num_tokens(vision) * 2 * a * inner + queries * (2 * a * inner + FP32 * config.num_heads)
    block = norms + own + cross + queries * a * config.mlp_width  # after ReLU
    # The first block's input is the queries themselves, for all images. Bias: as looked up, masked, and its mask.
    bias = (2 * a + 1) * config.num_heads * config.num_queries**2
    kept = (
        (config.num_layers - 1) * a * queries * config.width if how.recompute == "full" else config.num_layers * block
    )
    workspace = queries * a * (config.width + config.mlp_width) + (block if how.recompute == "full" else 0)
    # Sum over the blocks of the gradient of the vision tokens.
    workspace += images * num_tokens(vision) * a * vision.width
    last = how.rms_norm(queries, config.width) + queries * a * (config.width + output_width)
    return Saved(kept + bias + last, workspace)


def heads(model: ModelConfig, batch: MicroBatch, tp: int, how: Numerics) -> Saved:
    """Selected positions and the errors of the regression; the workspace is the logits of a chunk and what is made of
    them: itself, less the normaliser, exponential, all in fp32."""
    language = model.language_model
    image_targets = batch.images * (model.causal_transformer.num_queries + 1)
    kept = batch.text_targets * (how.width * language.width + 2 * INDEX + 2 * FP32)
    kept += image_targets * (how.width + FP32) * language.width
    return Saved(kept, 3 * FP32 * chunk_logits(language.vocabulary // tp, batch.text_targets))


def chunk_logits(vocabulary: int, targets: int) -> int:
    """Logits that are alive at a time."""
    return min(targets, max(1, CHUNK_LOGITS // vocabulary)) * vocabulary


def num_tokens(config: VisionConfig) -> int:
    return 1 + (config.image_size // config.patch_size) ** 2
