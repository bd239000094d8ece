"""Prompts of text and pictures to the tensors that the model takes, and generated ids back to text.

Shapes: B prompts, left-padded to S positions, with M pictures in all, each N slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from emu_inference.config import EmuConfig, UserError
from emu_inference.images import to_pixels
from emu_inference.tokenizer import Tokenizer, read_tokenizer

Prompt = Sequence[Union[str, PIL.Image.Image, Sequence[PIL.Image.Image]]]
"""Text and pictures in reading order. A sequence of pictures is a video: its frames one after another."""


@dataclass
class EmuInputs:
    """input_ids, attention_mask: int64 [B, S] (mask 0 = padding, on the left); images: uint8 [M, 3, H, W] in the order
    of their slots."""

    input_ids: Tensor
    attention_mask: Tensor
    images: Tensor

    def to(self, device: torch.device | str) -> EmuInputs:
        return EmuInputs(self.input_ids.to(device), self.attention_mask.to(device), self.images.to(device))


class EmuProcessor:
    def __init__(self, config: EmuConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> EmuProcessor:
        """Read config and tokenizer of an exported folder. UserError if they are missing or disagree."""
        config = EmuConfig.from_pretrained(folder)
        tokenizer = read_tokenizer(Path(folder))
        if tokenizer.get_piece_size() != config.tokens.pad:
            raise UserError(
                f"the tokenizer of {folder} has {tokenizer.get_piece_size()} pieces and the model {config.tokens.pad}: "
                "put the model's own there"
            )
        return cls(config, tokenizer)

    def __call__(self, prompts: Sequence[Prompt]) -> EmuInputs:
        """`<s>`, then each text's ids and each picture as `[IMG]`, N slots, `[/IMG]`; no `</s>`: the model goes on."""
        flat = [list(_flatten(prompt)) for prompt in prompts]
        rows = [self._encode(elements) for elements in flat]
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.config.tokens.pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask[row, length - len(ids) :] = 1
        images = [element for elements in flat for element in elements if not isinstance(element, str)]
        return EmuInputs(input_ids, attention_mask, self.pixels(images))

    def pixels(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """uint8 [M, 3, H, W], not normalised: the model does that."""
        size = self.config.vision.image_size
        stacked = [to_pixels(image, size) for image in images]
        return torch.from_numpy(np.stack(stacked)) if stacked else torch.zeros(0, 3, size, size, dtype=torch.uint8)

    def decode(self, generated: Iterable[Iterable[int]]) -> list[str]:
        """Text of each sequence of ids; what is no text piece is left out."""
        return [self.tokenizer.decode([i for i in ids if i < self.config.tokens.pad]) for ids in generated]

    def _encode(self, elements: list[str | PIL.Image.Image]) -> list[int]:
        tokens = self.config.tokens
        slots = [tokens.img_start, *[tokens.image] * self.config.causal_transformer.num_queries, tokens.img_end]
        ids = [tokens.bos]
        for element in elements:
            ids.extend(self.tokenizer.encode(element) if isinstance(element, str) else slots)
        return ids


def _flatten(prompt: Prompt) -> Iterable[str | PIL.Image.Image]:
    assert not isinstance(prompt, str), "a prompt is a list of texts and pictures, also when it is one text"
    for element in prompt:
        if isinstance(element, (str, PIL.Image.Image)):
            yield element
        else:
            yield from element
