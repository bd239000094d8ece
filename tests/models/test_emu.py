"""Emu.forward against loops over documents and positions, written from the paper's objective; every gradient too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.emu import NUM_SAMPLED, Emu
from models.vision_encoder import normalise_pixels
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
    Doc,
    assert_same_gradients,
    gradients,
    lay_out,
    tiny_emu,
)

TEXT_SCALE, IMAGE_SCALE = 0.3, 1.7
GRADIENT_TOLERANCE = 1e-4
"""Of each parameter's norm: fp32 sums in another order."""

BATCHES = {
    "several documents": [
        [Doc([BOS, 5, 6, *PICTURE, 7, 8, EOS], source=1), Doc([BOS, *PICTURE, *PICTURE, 8, EOS], source=2)],
        [Doc([BOS, 3, 4, EOS], source=2), Doc([BOS, 11, *PICTURE, 12, *PICTURE, EOS], source=0)],
    ],
    "a document that failed to decode": [
        [Doc([BOS, 5, *PICTURE, 7, EOS], source=1, ok=False), Doc([BOS, 9, *PICTURE, EOS], source=1)],
        [Doc([BOS, *PICTURE, 4, EOS], source=0)],
    ],
    "[PAD] inside a document": [[Doc([BOS, 5, PAD, 6, *PICTURE, PAD, EOS], source=1)]],
    "no image": [[Doc([BOS, 5, 6, EOS], source=1), Doc([BOS, 7, EOS])], [Doc([BOS, 3, EOS])]],
    "no text target": [[Doc([BOS, *PICTURE, *PICTURE], source=2)], [Doc([BOS, *PICTURE])]],
    "no target": [[Doc([BOS, 5, *PICTURE, EOS], ok=False)]],
    "one image before its text, row full": [[Doc([BOS, *PICTURE, 5, 6, 7, EOS])]],
}


def batch_of(name: str) -> dict[str, Tensor]:
    row_length = 10 if name.endswith("row full") else 26
    return lay_out(BATCHES[name], row_length)


def embed_images(model: Emu, images: Tensor) -> list[Tensor]:
    """One image at a time: [N, W] each."""
    vision = model.config.vision
    pixels = (normalise_pixels(image[None], vision.pixel_mean, vision.pixel_std, torch.float32) for image in images)
    return [model.causal_transformer(model.vision_encoder(image))[0] for image in pixels]


def input_embeddings(model: Emu, ids: list[int], images: Iterator[Tensor]) -> list[Tensor]:
    """The table's row of every token, except that the <image> slots after an [IMG] hold its image's embeddings."""
    table, slots = model.language_model.embed_tokens.weight, iter(())
    inputs = []
    for token in ids:
        if token == IMG:
            slots = iter(next(images))
        inputs.append(next(slots) if token == IMAGE else table[token])
    return inputs


def hidden_states(model: Emu, inputs: list[Tensor]) -> Tensor:
    """One document alone."""
    length = len(inputs)
    document_ids, position_ids = torch.ones(1, length, dtype=torch.int32), torch.arange(length)[None]
    return model.language_model(torch.stack(inputs)[None], document_ids, position_ids)[0]


def reference(model: Emu, rows: list[list[Doc]], images: Tensor) -> dict[str, Tensor]:
    """Sums of both losses per source and of the regression per slot; a document, a position at a time."""
    names = ("text_loss", "text_targets", "image_loss", "image_targets")
    sums = {name: [torch.zeros(())] * NUM_SOURCES for name in names}
    slots = {name: [torch.zeros(())] * (NUM_QUERIES + 1) for name in ("slot_error", "slot_count")}
    embedded = iter(embed_images(model, images))
    for document in (document for row in rows for document in row):
        ids, source = document.ids, document.source
        inputs = input_embeddings(model, ids, embedded)
        hidden = hidden_states(model, inputs)
        for i in range(len(ids) - 1 if document.ok else 0):
            if ids[i + 1] not in (PAD, IMG, IMG_END, IMAGE):
                logits = hidden[i] @ model.text_head.weight.t()
                sums["text_loss"][source] = sums["text_loss"][source] - logits.log_softmax(dim=0)[ids[i + 1]]
                sums["text_targets"][source] = sums["text_targets"][source] + 1
            if ids[i] in (IMG, IMAGE):
                predicted = hidden[i] @ model.regression_head.weight.t()
                error = (predicted - inputs[i + 1].detach()).square().mean()
                sums["image_loss"][source] = sums["image_loss"][source] + error
                sums["image_targets"][source] = sums["image_targets"][source] + 1
                start = max(begin for begin in range(i + 1) if ids[begin] == IMG)
                if start > 1:
                    slots["slot_error"][i - start] = slots["slot_error"][i - start] + error
                    slots["slot_count"][i - start] = slots["slot_count"][i - start] + 1
    return {name: torch.stack(values) for name, values in (sums | slots).items()}


def run(
    model: Emu, batch: dict[str, Tensor], text_scale: float = TEXT_SCALE, image_scale: float = IMAGE_SCALE
) -> dict[str, Tensor]:
    return model(**batch, text_scale=text_scale, image_scale=image_scale)


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_statistics_equal_the_loops(name: str) -> None:
    """Loss and every sum within 1e-5 relative."""
    model, batch = tiny_emu(), batch_of(name)
    outputs, expected = run(model, batch), reference(model, BATCHES[name], batch["images"])
    loss = TEXT_SCALE * expected["text_loss"].sum() + IMAGE_SCALE * expected["image_loss"].sum()
    torch.testing.assert_close(outputs["loss"], loss, rtol=1e-5, atol=1e-6)
    for statistic, value in expected.items():
        torch.testing.assert_close(outputs[statistic], value.detach(), rtol=1e-5, atol=1e-6, msg=statistic)
        assert not outputs[statistic].requires_grad


@pytest.mark.parametrize("name", BATCHES)
def test_gradients_equal_the_loops(name: str) -> None:
    """`full`, per parameter, within 1e-4 of its norm."""
    model, batch = tiny_emu(), batch_of(name)
    expected = reference(model, BATCHES[name], batch["images"])
    loss = TEXT_SCALE * expected["text_loss"].sum() + IMAGE_SCALE * expected["image_loss"].sum()
    assert_same_gradients(
        gradients(run(model, batch)["loss"], model), gradients_or_zeros(loss, model), GRADIENT_TOLERANCE
    )


def gradients_or_zeros(loss: Tensor, model: Emu) -> dict[str, Tensor]:
    """A reference without any target reaches no parameter at all."""
    if loss.requires_grad:
        return gradients(loss, model)
    return {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}


def test_regression_reaches_the_encoder_only_through_the_inputs() -> None:
    """A picture alone: its slots' targets carry no gradient, so moving the last slot's embedding, which is the input of
    only the prediction of [/IMG], leaves the other slots' predictions alone."""
    model = tiny_emu()
    batch = lay_out([[Doc([BOS, *PICTURE])]], 8)
    z = model.encode(batch["images"]).detach().requires_grad_()
    model.encode = lambda images: z  # type: ignore[method-assign]
    (gradient,) = torch.autograd.grad(run(model, batch)["loss"], z)
    assert gradient.abs().sum() > 0

    embeddings = model._embed(batch["input_ids"], z, batch["image_starts"])
    hidden = model.language_model(embeddings, batch["document_ids"], batch["position_ids"])[0]
    predicted = model.regression_head(hidden[1 + NUM_QUERIES])
    only_last = IMAGE_SCALE * (predicted - embeddings[0, 2 + NUM_QUERIES].detach()).square().mean()
    (expected,) = torch.autograd.grad(only_last, z)
    torch.testing.assert_close(gradient[0, -1], expected[0, -1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BATCHES)
def test_text_only_encoder_gradient(name: str) -> None:
    """Vision encoder and causal transformer get the text loss's gradient alone (within 1e-4 of its norm); the others
    exactly what `full` gives them."""
    full, text_only, batch = tiny_emu("full"), tiny_emu("text_only"), batch_of(name)
    outputs, outputs_full = run(text_only, batch), run(full, batch)
    assert torch.equal(outputs["loss"], outputs_full["loss"])
    actual, of_both = gradients(outputs["loss"], text_only), gradients(outputs_full["loss"], full)

    expected_text = TEXT_SCALE * reference(full, BATCHES[name], batch["images"])["text_loss"].sum()
    of_text = gradients_or_zeros(expected_text, full)
    encoder = [name for name in actual if name.startswith(("vision_encoder.", "causal_transformer."))]
    assert_same_gradients(
        {name: actual[name] for name in encoder}, {name: of_text[name] for name in encoder}, GRADIENT_TOLERANCE
    )
    for parameter in actual.keys() - set(encoder):
        assert torch.equal(actual[parameter], of_both[parameter]), parameter


def test_text_only_differs_from_full() -> None:
    """The batches are such that the option matters: encoder gradients differ by more than a tenth."""
    batch = batch_of("several documents")
    of_full, of_text = (
        gradients(run(model, batch)["loss"], model)["causal_transformer.projection.weight"]
        for model in (tiny_emu("full"), tiny_emu("text_only"))
    )
    assert (of_full - of_text).norm() > 0.1 * of_full.norm()


def test_text_only_without_gradients() -> None:
    """Evaluation under no_grad gives the same loss, within 1e-6 (attention may take another kernel)."""
    model, batch = tiny_emu("text_only"), batch_of("several documents")
    with torch.no_grad():
        without = run(model, batch)["loss"]
    torch.testing.assert_close(without, run(model, batch)["loss"].detach(), rtol=1e-6, atol=0)


def test_micro_batches_add_up() -> None:
    """Losses are sums: rows one by one give the same loss and gradients in all, within 1e-5 and 1e-4."""
    model, rows = tiny_emu(), BATCHES["several documents"]
    whole = batch_of("several documents")
    loss = run(model, whole)["loss"]
    split_at = sum(token == IMG for document in rows[0] for token in document.ids)
    parts = [lay_out([row], 26) for row in rows]
    parts[0]["images"], parts[1]["images"] = whole["images"][:split_at], whole["images"][split_at:]
    added = sum(run(model, part)["loss"] for part in parts)
    torch.testing.assert_close(added, loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(added, model), gradients(loss, model), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("regression_gradient", ["full", "text_only"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_module_runs_once_and_every_parameter_gets_a_gradient(name: str, regression_gradient: str) -> None:
    """Whatever the batch holds: a module that some rank leaves out or runs twice makes ZeRO-3 hang."""
    model = tiny_emu(regression_gradient)
    calls: dict[str, int] = {}
    for child, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            calls[child] = 0
            module.register_forward_hook(lambda *_, child=child: calls.update({child: calls[child] + 1}))
    run(model, batch_of(name))["loss"].backward()
    assert {child for child, count in calls.items() if count != 1} == set()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


def test_embedding_statistics_and_sample() -> None:
    """Sums over real images only, within 1e-5; the sample is the mean over slots."""
    model, batch = tiny_emu(), batch_of("several documents")
    outputs, z = run(model, batch), model.encode(batch["images"]).detach()
    torch.testing.assert_close(outputs["embedding_sum"], z.sum(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["embedding_square"], z.square().sum(dim=(0, 2)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["embedding_sample"], z.mean(dim=1), rtol=1e-5, atol=1e-5)
    assert outputs["num_images"].tolist() == [5.0]

    blank = run(model, batch_of("no image"))
    assert blank["num_images"].tolist() == [0.0] and blank["embedding_sample"].shape[0] == 0
    assert blank["embedding_sum"].abs().sum() == 0


def test_sample_is_bounded() -> None:
    many = lay_out([[Doc([BOS, *PICTURE])] for _ in range(NUM_SAMPLED + 3)], 6)
    with torch.no_grad():
        assert run(tiny_emu(), many)["embedding_sample"].shape == (NUM_SAMPLED, 32)
