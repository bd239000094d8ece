"""Targets and loss statistics against loops over positions; diagnostics of collapse on made-up embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.objective import (
    Targets,
    effective_rank,
    embedding_statistics,
    find_targets,
    loss_statistics,
    position_in_document,
    regression_errors,
    spread_across_images,
)
from tests.models.tiny_emu import (
    BOS,
    EOS,
    IMAGE,
    IMG,
    IMG_END,
    NUM_QUERIES,
    NUM_SOURCES,
    PAD,
    PICTURE,
    TEXT_VOCAB,
    Doc,
    lay_out,
)

ROW_LENGTH = 30
ROWS = [
    [Doc([BOS, 5, 6, *PICTURE, 7, EOS], source=1), Doc([BOS, *PICTURE, *PICTURE, 8, EOS], source=2)],
    [
        Doc([BOS, 9, *PICTURE, EOS], source=0, ok=False),
        Doc([BOS, 10, EOS], source=0),
        Doc([BOS, 11, *PICTURE], source=1),
    ],
    [Doc([BOS, 3, EOS], source=2)],
]


def targets_of(rows: list[list[Doc]], row_length: int = ROW_LENGTH) -> Targets:
    batch = lay_out(rows, row_length)
    del batch["images"], batch["image_counts"], batch["position_ids"]
    return find_targets(**batch, num_queries=NUM_QUERIES, text_vocab_size=TEXT_VOCAB)


def text_targets_by_hand(rows: list[list[Doc]], row_length: int) -> list[tuple[int, int, int]]:
    """(flat position, label, source) in reading order."""
    found = []
    for r, row in enumerate(rows):
        begin = 0
        for document in row:
            for i in range(len(document.ids) - 1):
                label = document.ids[i + 1]
                if document.ok and label not in (PAD, IMG, IMG_END, IMAGE):
                    found.append((r * row_length + begin + i, label, document.source))
            begin += len(document.ids)
    return found


def images_by_hand(rows: list[list[Doc]], row_length: int) -> list[tuple[list[int], int, bool]]:
    """(flat positions of [IMG] and its <image>s, source, whether more than <s> stands before) in reading order."""
    found = []
    for r, row in enumerate(rows):
        begin = 0
        for document in row:
            for i, token in enumerate(document.ids):
                if token == IMG and document.ok:
                    positions = [r * row_length + begin + i + step for step in range(NUM_QUERIES + 1)]
                    found.append((positions, document.source, i > 1))
            begin += len(document.ids)
    return found


def test_text_targets() -> None:
    """The next token of the same usable document, unless it is [PAD], [IMG], <image> or [/IMG]."""
    targets = targets_of(ROWS)
    listed = zip(
        targets.text_positions.tolist(), targets.text_labels.tolist(), targets.text_sources.tolist(), strict=True
    )
    assert list(listed) == text_targets_by_hand(ROWS, ROW_LENGTH)
    assert not set(targets.text_labels.tolist()) & {PAD, IMG, IMG_END, IMAGE}


def test_image_targets() -> None:
    targets = targets_of(ROWS)
    listed = zip(
        targets.image_positions.tolist(), targets.image_sources.tolist(), targets.has_context.tolist(), strict=True
    )
    assert list(listed) == images_by_hand(ROWS, ROW_LENGTH)


def test_counts_spelled_out() -> None:
    """Row 0: 5 6 7 </s>, 8 </s>; row 1: only 10 </s> and 11; row 2: 3 </s>. Four of the five images count."""
    targets = targets_of(ROWS)
    assert targets.text_labels.tolist() == [5, 6, 7, EOS, 8, EOS, 10, EOS, 11, 3, EOS]
    assert targets.image_positions.shape == (4, NUM_QUERIES + 1)
    assert targets.has_context.tolist() == [True, False, True, True]


def test_a_full_row_does_not_predict_the_next_row() -> None:
    """Both rows end without padding, and neighbouring documents have the same number in their rows."""
    targets = targets_of([[Doc([BOS, 4, 5])], [Doc([BOS, 6, 7])]], row_length=3)
    assert targets.text_positions.tolist() == [0, 1, 3, 4]
    assert targets.text_labels.tolist() == [4, 5, 6, 7]


def test_an_image_that_ends_its_row_keeps_all_targets() -> None:
    """[/IMG] is the row's last position: the last <image> predicts it, and nothing looks past the row."""
    targets = targets_of([[Doc([BOS, *PICTURE])], [Doc([BOS, *PICTURE])]], row_length=1 + len(PICTURE))
    assert targets.image_positions.tolist() == [[1, 2, 3, 4], [7, 8, 9, 10]]


@pytest.mark.parametrize(
    ("rows", "num_text", "num_images"),
    [
        ([[Doc([BOS, 4, EOS])]], 2, 0),
        ([[Doc([BOS, *PICTURE])]], 0, 1),
        ([[Doc([BOS, 4, *PICTURE, EOS], ok=False)]], 0, 0),
    ],
    ids=["no image", "no text", "nothing usable"],
)
def test_empty_sets_of_targets_keep_their_shapes(rows: list[list[Doc]], num_text: int, num_images: int) -> None:
    targets = targets_of(rows)
    assert targets.text_positions.shape == targets.text_labels.shape == targets.text_sources.shape == (num_text,)
    assert targets.image_positions.shape == (num_images, NUM_QUERIES + 1)
    assert targets.image_sources.shape == targets.has_context.shape == (num_images,)


@pytest.mark.parametrize("token", [PAD, IMG_END])
def test_a_stray_special_token_is_never_a_target(token: int) -> None:
    """The first and the last but one of the special tokens stand where no packer puts them."""
    assert targets_of([[Doc([BOS, 4, token, 5, EOS])]]).text_labels.tolist() == [4, 5, EOS]


def test_position_in_document() -> None:
    ids = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 2]], dtype=torch.int32)
    positions = position_in_document(ids)
    assert positions[0, :6].tolist() == [0, 1, 2, 0, 0, 1]
    assert positions[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


def test_regression_errors() -> None:
    """Mean over dimensions of the squared difference to the embedding one position further, within 1e-6; the target
    gets no gradient."""
    embeddings = torch.randn(20, 6, requires_grad=True)
    positions = torch.tensor([[2, 3, 4, 5], [15, 16, 17, 18]])
    predicted = torch.randn(2, 4, 6, requires_grad=True)
    errors = regression_errors(predicted, embeddings, positions)
    for image in range(2):
        for slot in range(4):
            target = embeddings[positions[image, slot] + 1].detach()
            expected = sum(float(predicted[image, slot, d] - target[d]) ** 2 for d in range(6)) / 6
            assert float(errors[image, slot]) == pytest.approx(expected, rel=1e-6)
    predicted_gradient, target_gradient = torch.autograd.grad(errors.sum(), (predicted, embeddings), allow_unused=True)
    assert predicted_gradient.abs().sum() > 0 and target_gradient is None


def test_loss_statistics() -> None:
    """Sums per source and per slot against loops, within 1e-5; sources without targets have zeros."""
    targets = targets_of(ROWS)
    text_losses, errors = torch.rand(len(targets.text_positions)), torch.rand(4, NUM_QUERIES + 1)
    statistics = loss_statistics(text_losses, errors, targets, NUM_SOURCES + 1)

    text, images = text_targets_by_hand(ROWS, ROW_LENGTH), images_by_hand(ROWS, ROW_LENGTH)
    for source in range(NUM_SOURCES + 1):
        chosen = [float(loss) for loss, (_, _, of) in zip(text_losses, text, strict=True) if of == source]
        assert float(statistics["text_loss"][source]) == pytest.approx(sum(chosen), abs=1e-5)
        assert float(statistics["text_targets"][source]) == len(chosen)
        chosen = [float(error.sum()) for error, (_, of, _) in zip(errors, images, strict=True) if of == source]
        assert float(statistics["image_loss"][source]) == pytest.approx(sum(chosen), abs=1e-5)
        assert float(statistics["image_targets"][source]) == len(chosen) * (NUM_QUERIES + 1)
    for slot in range(NUM_QUERIES + 1):
        chosen = [float(error[slot]) for error, (_, _, context) in zip(errors, images, strict=True) if context]
        assert float(statistics["slot_error"][slot]) == pytest.approx(sum(chosen), abs=1e-5)
        assert float(statistics["slot_count"][slot]) == len(chosen)


def spread(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    sums = embedding_statistics(embeddings)
    return spread_across_images(sums["embedding_sum"], sums["embedding_square"], float(sums["num_images"]))


def test_spread_is_the_variance_across_images() -> None:
    """Within 1e-4 of torch's population variance per slot; slots have different scales and means."""
    scale = torch.tensor([0.5, 1.0, 3.0])[None, :, None]
    embeddings = scale * torch.randn(50, 3, 8) + 2 * torch.randn(1, 3, 8)
    variance, mean_square = spread(embeddings)
    torch.testing.assert_close(variance, embeddings.var(dim=0, unbiased=False).mean(dim=1), rtol=1e-4, atol=0)
    torch.testing.assert_close(mean_square, embeddings.square().mean(dim=(0, 2)), rtol=1e-5, atol=0)


def test_identical_images_have_no_spread_whatever_their_slots() -> None:
    """Slots differ from one another, images do not: variance below 1e-5 of the mean square, as far as fp32 sums go (a
    deviation of 0.3 %, where the alarm is at 2 %)."""
    variance, mean_square = spread(torch.randn(1, 5, 64).expand(100, -1, -1))
    assert (variance < 1e-5 * mean_square).all()


def test_spread_adds_over_parts() -> None:
    """Sums of two halves give the variance of the whole, within 1e-5."""
    embeddings = torch.randn(40, 3, 8)
    halves = [embedding_statistics(half) for half in embeddings.split(20)]
    added = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    variance, _ = spread_across_images(added["embedding_sum"], added["embedding_square"], float(added["num_images"]))
    torch.testing.assert_close(variance, spread(embeddings)[0], rtol=1e-5, atol=0)


def test_effective_rank_of_collapsed_embeddings() -> None:
    """Identical images, and images on one line: 1 (within 1e-3)."""
    assert effective_rank(torch.randn(1, 32).expand(20, -1)) == pytest.approx(1, abs=1e-3)
    line = torch.linspace(-1, 1, 20)[:, None] * torch.randn(1, 32) + torch.randn(1, 32)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)


def test_effective_rank_counts_equal_directions() -> None:
    """The k corners +-e_i of a cross-polytope vary equally in k directions: exactly k, within 1e-3."""
    for k in (2, 5, 16):
        corners = torch.cat([torch.eye(k), -torch.eye(k)])
        turned = corners @ torch.linalg.qr(torch.randn(32, k)).Q.t()
        assert effective_rank(3 * turned + 10) == pytest.approx(k, rel=1e-3)


def test_effective_rank_is_that_of_finite_embeddings() -> None:
    embeddings = torch.randn(20, 8)
    embeddings[0, 1], embeddings[3, 2] = float("nan"), float("inf")
    assert effective_rank(embeddings) == effective_rank(torch.cat([embeddings[1:3], embeddings[4:]]))
    assert effective_rank(embeddings[[0, 3, 5]]) is None  # one is left
    assert effective_rank(embeddings[:1]) is None


def test_effective_rank_of_random_embeddings_is_near_their_rank() -> None:
    """2,000 Gaussian samples of rank 8: between 7.9 and 8."""
    directions = torch.linalg.qr(torch.randn(32, 8)).Q.t()
    assert 7.9 < effective_rank(torch.randn(2000, 8) @ directions) <= 8.001
