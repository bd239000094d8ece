"""Which positions predict what, the unified loss (Emu section 2.2), and what tells learning from collapse.

Shapes: B rows of S positions, M images of N slots, T text targets, I supervised images, W width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_SPECIAL_TOKENS = 4
"""[PAD], [IMG], [/IMG], <image>, which follow the text vocabulary in this order, as in the released model."""


@dataclass
class Targets:
    """Flat positions (row * S + column) with a target.

    text_positions, text_labels, text_sources: int64 [T]; hidden state there -> token id, source number.
    image_positions: int64 [I, N + 1]: `[IMG]` and every `<image>`, each predicting the input embedding one further, so
    `[IMG]` -> z_1, ..., z_N -> `[/IMG]`. image_sources: int64 [I]. has_context: bool [I], something of the document
    stands before the image.
    """

    text_positions: Tensor
    text_labels: Tensor
    text_sources: Tensor
    image_positions: Tensor
    image_sources: Tensor
    has_context: Tensor


def find_targets(
    input_ids: Tensor,
    document_ids: Tensor,
    document_ok: Tensor,
    document_sources: Tensor,
    image_starts: Tensor,
    num_queries: int,
    text_vocab_size: int,
) -> Targets:
    """Positions with targets in packed rows; see `Batch` for the inputs' shapes.

    Text: the next token of the same document, unless it is [PAD], [IMG], [/IMG] or <image> (never a text target in the
    released code). A document whose picture failed to decode (document_ok False) has no targets at all.
    """
    row_length = input_ids.shape[1]
    index = (document_ids.long() - 1).clamp(min=0)
    usable = document_ok.gather(1, index) & (document_ids > 0)
    sources = document_sources.gather(1, index)

    labels = input_ids[:, 1:]
    special = (labels >= text_vocab_size) & (labels < text_vocab_size + NUM_SPECIAL_TOKENS)
    predicts = (document_ids[:, 1:] == document_ids[:, :-1]) & usable[:, 1:] & ~special
    rows, columns = predicts.nonzero(as_tuple=True)

    starts = image_starts[usable[image_starts[:, 0], image_starts[:, 1]]]
    first = starts[:, 0] * row_length + starts[:, 1]
    positions = position_in_document(document_ids)
    return Targets(
        text_positions=rows * row_length + columns,
        text_labels=labels[rows, columns],
        text_sources=sources[rows, columns],
        image_positions=first[:, None] + torch.arange(num_queries + 1, device=first.device),
        image_sources=sources[starts[:, 0], starts[:, 1]],
        has_context=positions[starts[:, 0], starts[:, 1]] > 1,
    )


def position_in_document(document_ids: Tensor) -> Tensor:
    """int64 [B, S]: columns since the document's first position (`<s>` is 0)."""
    columns = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return columns - torch.where(first, columns, 0).cummax(dim=1).values


def regression_errors(predicted: Tensor, embeddings: Tensor, image_positions: Tensor) -> Tensor:
    """Squared error to the *next* input embedding, mean over its W dimensions: fp32 [I, N + 1].

    predicted: [I, N + 1, W] from the regression head; embeddings: input embeddings [B * S, W]. Targets carry no
    gradient, as in the released forward pass.
    """
    targets = embeddings.detach()[image_positions + 1]
    return (predicted.float() - targets.float()).square().mean(dim=-1)


class StopRegressionGradient(torch.autograd.Function):
    """Identity for the visual embeddings; backward hands on the text loss's gradient alone.

    The gradient that arrives is that of both losses together; `holder["gradient"]` must have been filled with the text
    loss's own before. It is handed on as it is: the loss must be driven backward with factor 1.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, holder: dict[str, Tensor]) -> Tensor:
        ctx.holder = holder
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.holder.pop("gradient"), None


@torch.no_grad()
def loss_statistics(text_losses: Tensor, image_errors: Tensor, targets: Targets, num_sources: int) -> dict[str, Tensor]:
    """Sums that can be added over micro-batches and ranks, fp32: per source [num_sources] and per slot [N + 1].

    text_loss, text_targets, image_loss, image_targets per source; slot_error, slot_count per predicted slot over images
    with context (the first slot can only be told from context).
    """

    def by_source(values: Tensor, sources: Tensor) -> Tensor:
        return torch.zeros(num_sources, device=values.device).index_add_(0, sources, values.float())

    per_image = torch.full_like(image_errors[:, 0], float(image_errors.shape[1]))
    with_context = image_errors[targets.has_context]
    return {
        "text_loss": by_source(text_losses, targets.text_sources),
        "text_targets": by_source(torch.ones_like(text_losses), targets.text_sources),
        "image_loss": by_source(image_errors.sum(dim=1), targets.image_sources),
        "image_targets": by_source(per_image, targets.image_sources),
        "slot_error": with_context.sum(dim=0).float(),
        "slot_count": torch.full_like(with_context.sum(dim=0), float(len(with_context))),
    }


@torch.no_grad()
def embedding_statistics(embeddings: Tensor) -> dict[str, Tensor]:
    """Sums over images of visual embeddings [M, N, W]: embedding_sum [N, W], embedding_square [N], num_images [1]."""
    z = embeddings.float()
    return {
        "embedding_sum": z.sum(dim=0),
        "embedding_square": z.square().sum(dim=(0, 2)),
        "num_images": torch.full((1,), float(z.shape[0]), device=z.device),
    }


def spread_across_images(embedding_sum: Tensor, embedding_square: Tensor, num_images: float) -> tuple[Tensor, Tensor]:
    """Variance of the embeddings across images at each slot [N], mean over dimensions, and their mean square [N]."""
    width = embedding_sum.shape[1]
    mean_square = embedding_square / (num_images * width)
    square_of_mean = (embedding_sum / num_images).square().mean(dim=1)
    return (mean_square - square_of_mean).clamp(min=0), mean_square


def effective_rank(embeddings: Tensor) -> float | None:
    """exp of the entropy of the covariance spectrum of [M, W] embeddings (Roy and Vetterli 2007); 1 = one direction.

    Of those whose numbers are finite; None where these are fewer than 2.
    """
    finite = embeddings[embeddings.isfinite().all(dim=1)].float()
    if len(finite) < 2:
        return None
    centred = finite - finite.mean(dim=0)
    spectrum = torch.linalg.svdvals(centred).square()
    share = spectrum / spectrum.sum().clamp(min=1e-30)
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))
