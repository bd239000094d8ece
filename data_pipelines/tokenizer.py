"""Text to ids: a sentencepiece model with LLaMA's layout, and the four ids that follow its pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from conf import UserError

LLAMA_LAYOUT = (0, 1, 2)


class Tokenizer:
    """sentencepiece ``tokenizer.model`` with unk 0, bos 1, eos 2.

    text_vocab_size: pieces of the model (T); the ids of ``[PAD]``, ``[IMG]``, ``[/IMG]`` and ``<image>`` are T..T+3, in
    the order of Emu's released code. digest: sha256 of the file.

    Raises UserError when the file is missing, is no sentencepiece model or has another layout.
    """

    def __init__(self, path: str | Path) -> None:
        serialized = _read(Path(path))
        self.digest = hashlib.sha256(serialized).hexdigest()
        self._model = _load(serialized, path)
        self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
        self.text_vocab_size = self._model.get_piece_size()
        self.pad = self.text_vocab_size
        self.img_start = self.text_vocab_size + 1
        self.img_end = self.text_vocab_size + 2
        self.image = self.text_vocab_size + 3

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of every text, without ``<s>`` and ``</s>``; a special token spelt in a text is plain text."""
        return [self._model.encode(text) for text in texts]  # for a list, sentencepiece would start a thread

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; what is no text piece (pictures, padding) is left out."""
        return self._model.decode([int(i) for i in ids if i < self.text_vocab_size])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the tokenizer {path} cannot be read ({error.strerror}): set data.tokenizer to a sentencepiece model"
        ) from error


def _load(serialized: bytes, path: str | Path) -> sentencepiece.SentencePieceProcessor:
    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(serialized)
    except RuntimeError as error:
        raise UserError(
            f"{path} is no sentencepiece model: set data.tokenizer to the tokenizer.model of a LLaMA-like model"
        ) from error
    if (model.unk_id(), model.bos_id(), model.eos_id()) != LLAMA_LAYOUT:
        raise UserError(
            f"{path} does not have unk 0, bos 1, eos 2: set data.tokenizer to a tokenizer.model in LLaMA's layout"
        )
    return model
