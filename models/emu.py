"""Emu up to its two heads: images become embeddings among the text tokens, one decoder predicts the next of either.

Shapes: B rows of S positions, M images of N slots, m of them on this rank, W width of the language model. `Batch` in
data_pipelines/document.py says what the inputs hold.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor, nn

from models.causal_transformer import CausalTransformer, Linear
from models.config import CausalTransformerConfig, ModelConfig, ObjectiveConfig, VisionConfig
from models.language_model import ON_ITS_OWN, LanguageModel, Parallelism
from models.objective import (
    StopRegressionGradient,
    embedding_statistics,
    find_targets,
    loss_statistics,
    regression_errors,
)
from models.tensor_parallel import gather_images
from models.text_head import LanguageModelHead
from models.vision_encoder import VisionEncoder, normalise_pixels

NUM_SAMPLED = 64
"""Images whose mean embedding is returned for the effective rank."""


def build_vision_encoder(config: VisionConfig) -> VisionEncoder:
    sizes = {name: value for name, value in asdict(config).items() if not name.startswith("pixel_")}
    return VisionEncoder(**sizes)


def build_causal_transformer(config: CausalTransformerConfig, vision_width: int, width: int) -> CausalTransformer:
    return CausalTransformer(vision_width, width, **asdict(config))


def gradient_keeping_graph(loss: Tensor, of: Tensor) -> Tensor:
    """d loss / d of, leaving the graph for the backward pass proper. An engine that counts passes puts its own here."""
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


class Emu(nn.Module):
    """The pretrained network. Every submodule runs exactly once per forward pass, whatever the batch holds."""

    def __init__(
        self,
        config: ModelConfig,
        objective: ObjectiveConfig,
        num_sources: int,
        parallelism: Parallelism = ON_ITS_OWN,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_sources = num_sources
        self.text_only_encoder = objective.regression_gradient == "text_only"
        width = config.language_model.width
        self.vision_encoder = build_vision_encoder(config.vision)
        self.causal_transformer = build_causal_transformer(config.causal_transformer, config.vision.width, width)
        self.vision_encoder.recompute = self.causal_transformer.recompute = parallelism.recompute == "full"
        self.language_model = LanguageModel(config.language_model, parallelism)
        self.text_head = LanguageModelHead(config.language_model)
        self.regression_head = Linear(width, width, std=config.language_model.init_std)
        self.early_gradient = gradient_keeping_graph

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [M, 3, H, W] -> visual embeddings [M, N, W]."""
        vision = self.config.vision
        pixels = normalise_pixels(images, vision.pixel_mean, vision.pixel_std, self.regression_head.weight.dtype)
        return self.causal_transformer(self.vision_encoder(pixels))

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor,
        position_ids: Tensor,
        images: Tensor,
        image_starts: Tensor,
        image_counts: list[int],
        document_sources: Tensor,
        document_ok: Tensor,
        text_scale: float,
        image_scale: float,
        answers: bool = False,
    ) -> dict[str, Tensor]:
        """One micro-batch.

        text_scale, image_scale: factors of the *sums* of the two losses; the caller divides by global target counts.
        Returns `loss` (to be driven backward), detached sums (`loss_statistics`, `embedding_statistics`), and
        embedding_sample [<= 64, W].

        answers: what the model says in place of how wrong it is, by the same modules in the same order: next_tokens
        int64 [T], the likeliest text token at every position with a text target (`find_targets`); regressed [M, W] at
        every `[IMG]`, and first_slots [M, W], the embedding that should stand there.
        """
        targets = find_targets(
            input_ids,
            document_ids,
            document_ok,
            document_sources,
            image_starts,
            self.config.causal_transformer.num_queries,
            self.config.language_model.text_vocab_size,
        )
        own, unused = self._encode_or_blank(images)
        visual = gather_images(own, image_counts, get_tensor_model_parallel_group())
        holder: dict[str, Tensor] = {}
        if self.text_only_encoder and torch.is_grad_enabled():
            visual = StopRegressionGradient.apply(visual, holder)
        embeddings = self._embed(input_ids, visual, image_starts)
        hidden = self.language_model(embeddings, document_ids, position_ids).flatten(0, 1)
        if answers:
            return {
                "next_tokens": self.text_head(hidden[targets.text_positions]),
                "regressed": self.regression_head(hidden[image_starts[:, 0] * input_ids.shape[1] + image_starts[:, 1]]),
                "first_slots": visual[:, 0],
            }

        text_losses = self.text_head(hidden[targets.text_positions], targets.text_labels)
        predicted = self.regression_head(hidden[targets.image_positions])
        errors = regression_errors(predicted, embeddings.flatten(0, 1), targets.image_positions)
        text_loss = text_scale * text_losses.sum()
        if self.text_only_encoder and torch.is_grad_enabled():
            holder["gradient"] = self.early_gradient(text_loss, visual)
        return {
            "loss": text_loss + image_scale * errors.sum() + 0 * unused.sum(),
            **loss_statistics(text_losses, errors, targets, self.num_sources),
            **embedding_statistics(visual),
            "embedding_sample": visual.detach().mean(dim=1)[:NUM_SAMPLED].float(),
        }

    def _encode_or_blank(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [m, N, W] of this rank's images, and of a blank one where it has none: a module that some rank
        leaves out makes ZeRO-3 hang."""
        if len(images):
            z = self.encode(images)
            return z, z[:0]
        size = self.config.vision.image_size
        blank = self.encode(images.new_zeros(1, 3, size, size))
        return blank[:0], blank

    def _embed(self, input_ids: Tensor, visual: Tensor, image_starts: Tensor) -> Tensor:
        """Token embeddings [B, S, W] with the visual ones put over the `<image>` slots."""
        tokens = self.language_model.embed_tokens(input_ids)
        first = image_starts[:, 0] * input_ids.shape[1] + image_starts[:, 1]
        slots = (first[:, None] + torch.arange(1, visual.shape[1] + 1, device=first.device)).flatten()
        return tokens.flatten(0, 1).index_copy(0, slots, visual.flatten(0, 1).to(tokens.dtype)).view_as(tokens)
