"""Formulas of the diagnostics, on embeddings and errors made up so that the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.config import ObjectiveConfig
from models.objective import embedding_statistics
from trainer.diagnostics import VARIANCE_DECAY, StepSums, TargetVariance, collapse_metrics, loss_metrics

NUM_IMAGES, NUM_SLOTS, WIDTH = 40, 4, 6


def sums_of(embeddings: Tensor, mean_errors: list[float] | None = None, with_context: int = 10) -> StepSums:
    """mean_errors: of the N + 1 predictions of an image, over `with_context` images."""
    errors = torch.tensor(mean_errors or [0.0] * (embeddings.shape[1] + 1)).double() * with_context
    counts = torch.full_like(errors, float(with_context))
    return StepSums({**embedding_statistics(embeddings), "slot_error": errors, "slot_count": counts})


def embeddings() -> Tensor:
    """Slot n varies with n + 1 times the deviation of slot 0, around a common mean."""
    scale = torch.arange(1.0, NUM_SLOTS + 1)[None, :, None]
    generator = torch.Generator().manual_seed(0)
    return 2 + scale * torch.randn(NUM_IMAGES, NUM_SLOTS, WIDTH, generator=generator)


def variances(z: Tensor) -> list[float]:
    return z.double().var(dim=0, unbiased=False).mean(dim=1).tolist()


def test_explained_variance_of_perfect_predictions_is_one() -> None:
    """The last prediction, of [/IMG], is no embedding of an image and does not count."""
    metrics = collapse_metrics(sums_of(embeddings(), [0.0] * NUM_SLOTS + [99.0]))
    assert metrics["explained_variance_first"] == metrics["explained_variance_later"] == 1.0


def test_explained_variance_of_the_mean_is_zero() -> None:
    """Predicting every slot's mean over images has exactly the variance as error: 0 within 1e-5."""
    z = embeddings()
    metrics = collapse_metrics(sums_of(z, [*variances(z), 99.0]))
    assert metrics["explained_variance_first"] == pytest.approx(0, abs=1e-5)
    assert metrics["explained_variance_later"] == pytest.approx(0, abs=1e-5)


def test_explained_variance_is_per_slot() -> None:
    """First slot: 1 - error / variance of that slot; later ones: the mean of theirs. Within 1e-5."""
    z = embeddings()
    unit, share = variances(z), [0.3, 0.1, 0.5, 2.0]
    metrics = collapse_metrics(sums_of(z, [u * s for u, s in zip(unit, share, strict=True)] + [99.0]))
    assert metrics["explained_variance_first"] == pytest.approx(0.7, abs=1e-5)
    assert metrics["explained_variance_later"] == pytest.approx(1 - (0.1 + 0.5 + 2.0) / 3, abs=1e-5)


def test_spread_of_collapsed_and_of_centred_embeddings() -> None:
    """Identical images: below 1 %, far under the alarm's 2 %. Mean zero across images: 1 within 1e-5."""
    z = embeddings()
    assert collapse_metrics(sums_of(z[:1].expand(NUM_IMAGES, -1, -1)))["embedding_spread"] < 0.01
    metrics = collapse_metrics(sums_of(z - z.mean(dim=0)))
    assert metrics["embedding_spread"] == pytest.approx(1, abs=1e-5)
    assert metrics["embedding_rms"] == pytest.approx(sum(variances(z)) ** 0.5 / NUM_SLOTS**0.5, rel=1e-5)
    assert metrics["embedding_std_per_slot"] == pytest.approx([v**0.5 for v in variances(z)], abs=1e-5)


def test_loss_metrics_are_means_over_targets() -> None:
    """Sums over sums, never means of means; sources without targets are left out."""
    sums = StepSums(
        {
            "text_loss": torch.tensor([6.0, 1.0, 0.0]),
            "text_targets": torch.tensor([2.0, 8.0, 0.0]),
            "image_loss": torch.zeros(3),
            "image_targets": torch.zeros(3),
        }
    )
    metrics = loss_metrics(sums, ["laion", "mmc4", "webvid"])
    assert metrics["loss/text"] == pytest.approx(0.7)
    assert metrics["loss/text/laion"] == 3.0 and metrics["loss/text/mmc4"] == 0.125
    assert metrics["targets/text/mmc4"] == 8
    assert metrics["loss/image"] == 0.0
    assert not {name for name in metrics if name.endswith("webvid") or name.startswith("loss/image/")}


def test_step_sums_add_micro_batches() -> None:
    """Sums of two halves give the metrics of the whole, within 1e-5; the sample is the last one's."""
    z, added = embeddings(), StepSums()
    for half in z.split(NUM_IMAGES // 2):
        part = sums_of(half, [0.5] * (NUM_SLOTS + 1), with_context=5)
        added.add({**part.values, "loss": torch.tensor(1.0), "embedding_sample": half.mean(dim=1)})
    whole = collapse_metrics(sums_of(z, [0.5] * (NUM_SLOTS + 1)))
    for name, value in collapse_metrics(added).items():
        assert value == pytest.approx(whole[name], abs=1e-5), name
    assert added.embedding_sample is not None and torch.equal(added.embedding_sample, z[NUM_IMAGES // 2 :].mean(dim=1))
    assert "loss" not in added.values


def test_target_variance_is_a_running_mean() -> None:
    """Nothing before the first step with two images, then that step's variance, then decayed; within 1e-5."""
    running, normalised = TargetVariance(), ObjectiveConfig(target_normalisation="variance")
    assert running.factor(normalised) == 0.0
    running.update(sums_of(embeddings()[:1]))
    assert running.factor(normalised) == 0.0

    first, second = embeddings(), 3 * embeddings()
    running.update(sums_of(first))
    seen = sum(variances(first)) / NUM_SLOTS
    assert running.factor(normalised) == pytest.approx(1 / seen, rel=1e-5)
    running.update(sums_of(second))
    seen = VARIANCE_DECAY * seen + (1 - VARIANCE_DECAY) * 9 * seen
    assert running.factor(normalised) == pytest.approx(1 / seen, rel=1e-5)
    assert running.factor(ObjectiveConfig(target_normalisation="none")) == 1.0


def test_too_few_images_tell_nothing() -> None:
    """One picture has no variance: that is no collapse. Without context nothing was explained: that is no success."""
    assert collapse_metrics(sums_of(embeddings()[:1])) == {}
    assert collapse_metrics(sums_of(embeddings()[:0])) == {}
    metrics = collapse_metrics(sums_of(embeddings(), with_context=0))
    assert metrics["embedding_spread"] > 0.1
    assert not {name for name in metrics if name.startswith("explained")}
