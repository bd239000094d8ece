"""The exported model against the trainer's own modules, which hold the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines.tokenizer import Tokenizer
from models.emu import Emu
from tests.inference.conftest import picture

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
PROMPTS: list[list[Any]] = [
    [picture(1), "a small red circle"],
    ["what is left of", picture(2), "and", picture(3), "the large blue square above it"],
    ["a green triangle"],
    [[picture(4), picture(5), picture(6)]],
    [picture(7)],
    [],
]


def run_reference(emu: Emu, embeddings: Tensor) -> Tensor:
    """Hidden states [S, W] of one unpadded sequence of input embeddings [S, W], by the trainer's language model."""
    length = len(embeddings)
    document_ids = torch.ones(1, length, dtype=torch.int32)
    return emu.language_model(embeddings[None], document_ids, torch.arange(length)[None])[0]


def embed_reference(emu: Emu, processor: Any, prompt: Sequence[Any]) -> Tensor:
    """Input embeddings [S, W] of one prompt, by the trainer's `_embed`."""
    inputs = processor([prompt])
    starts = (inputs.input_ids[0] == processor.config.tokens.img_start).nonzero()
    image_starts = torch.cat([torch.zeros_like(starts), starts], dim=1)
    visual = emu.encode(inputs.images) if len(inputs.images) else torch.zeros(0, 5, 64)
    return emu._embed(inputs.input_ids, visual, image_starts)[0]


def test_images_are_encoded_as_in_training(reference: Emu, model: Any, processor: Any) -> None:
    images = processor.pixels([picture(1), picture(2)])
    expected = reference.encode(images)
    assert expected.shape == (2, 5, 64) and (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(model.encode_images(images), expected, **TOLERANCE)


def test_both_heads_say_the_same_of_every_position(reference: Emu, model: Any, processor: Any) -> None:
    inputs = processor(PROMPTS)
    output = model(inputs)
    for row, prompt in enumerate(PROMPTS):
        hidden = run_reference(reference, embed_reference(reference, processor, prompt))
        real = inputs.attention_mask[row].bool()
        torch.testing.assert_close(output.logits[row, real], hidden @ reference.text_head.weight.t(), **TOLERANCE)
        torch.testing.assert_close(output.regressed[row, real], reference.regression_head(hidden), **TOLERANCE)


def test_regressed_images_equal_running_the_whole_sequence_again_for_each_embedding(
    reference: Emu, model: Any, processor: Any
) -> None:
    regressed = model.regress_image(processor(PROMPTS))
    assert regressed.shape == (len(PROMPTS), 5, 64)
    img_start = torch.tensor([processor.config.tokens.img_start])
    for row, prompt in enumerate(PROMPTS):
        opening = reference.language_model.embed_tokens(img_start)
        sequence = torch.cat([embed_reference(reference, processor, prompt), opening])
        for slot in range(5):
            z = reference.regression_head(run_reference(reference, sequence)[-1:])
            torch.testing.assert_close(regressed[row, slot], z[0], **TOLERANCE)
            sequence = torch.cat([sequence, z])


def test_greedy_text_equals_running_the_whole_sequence_again_for_each_token(
    package: ModuleType, reference: Emu, model: Any, processor: Any, tokenizer: Tokenizer
) -> None:
    generated = model.generate(processor(PROMPTS), package.GenerationOptions(max_new_tokens=12))
    for ids, prompt in zip(generated, PROMPTS, strict=True):
        sequence = embed_reference(reference, processor, prompt)
        expected: list[int] = []
        while len(expected) < 12:
            logits = reference.text_head.weight @ run_reference(reference, sequence)[-1]
            token = int(logits[: tokenizer.text_vocab_size].argmax())  # never [PAD], [IMG], [/IMG] or <image>
            if token == tokenizer.eos:
                break
            expected.append(token)
            sequence = torch.cat([sequence, reference.language_model.embed_tokens(torch.tensor([token]))])
        assert ids == expected
    assert len({len(ids) < 12 for ids in generated}) == 2, "some texts end by themselves and some are cut"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_padded_batch_generates_what_each_prompt_alone_does(
    package: ModuleType, model: Any, processor: Any, num_beams: int
) -> None:
    options = package.GenerationOptions(num_beams=num_beams, max_new_tokens=8, length_penalty=1.0)
    together = model.generate(processor(PROMPTS), options)
    assert together == [model.generate(processor([prompt]), options)[0] for prompt in PROMPTS]


def test_beams_find_more_likely_texts_than_the_greedy_ones(
    package: ModuleType, model: Any, processor: Any, tokenizer: Tokenizer
) -> None:
    def log_probability(prompt: list[Any], ids: list[int]) -> float:
        targets = torch.tensor([*ids, tokenizer.eos][:8])
        inputs = processor([prompt])
        num_given = inputs.input_ids.shape[1]
        inputs.input_ids = torch.cat([inputs.input_ids, targets[None]], dim=1)
        inputs.attention_mask = torch.ones_like(inputs.input_ids)
        logits = model(inputs).logits[0, num_given - 1 : -1, : tokenizer.text_vocab_size]
        return float(logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum())

    inputs = processor(PROMPTS)
    greedy, beams = (
        sum(map(log_probability, PROMPTS, model.generate(inputs, package.GenerationOptions(num_beams, 8))))
        for num_beams in (1, 5)
    )
    assert beams > greedy + 1


def test_lower_precision_stays_near(package: ModuleType, exported: Path, model: Any, processor: Any) -> None:
    lower = package.EmuModel.from_pretrained(exported, dtype=torch.bfloat16)
    inputs = processor(PROMPTS)
    expected = model(inputs).regressed
    regressed = lower(inputs).regressed
    assert regressed.dtype == torch.bfloat16
    assert (regressed.float() - expected).norm() < 0.03 * expected.norm()
    assert lower.language_model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_prompt_beyond_the_positions_of_the_model_is_refused(package: ModuleType, model: Any, processor: Any) -> None:
    long = processor([["red " * 120]])
    with pytest.raises(package.UserError, match="128"):
        model.generate(long)
    with pytest.raises(package.UserError, match="shorten the prompt"):
        model.regress_image(long)
