"""Text to ids and back, by whichever tokenizer the model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from emu_inference.config import UserError

SENTENCEPIECE, JSON = "tokenizer.model", "tokenizer.json"


class Tokenizer(Protocol):
    """encode: ids of a text, without `<s>` and `</s>`; a special token spelt in it is plain text."""

    def get_piece_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json or tokenizer.model of an exported folder. UserError if it cannot be read."""
    path = folder / (JSON if (folder / JSON).exists() else SENTENCEPIECE)
    try:
        if path.name == JSON:
            return _JsonModel(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(path.read_bytes())
    except Exception as error:  # whatever either library finds wrong
        raise UserError(f"{path} cannot be read as a tokenizer ({error}): export the model again") from error
    return model


class _JsonModel:
    """A tokenizer of the tokenizers library, under sentencepiece's names."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        self._model = model
        self._model.encode_special_tokens = True  # means: as the text that they are

    def get_piece_size(self) -> int:
        return 1 + max(self._model.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)
