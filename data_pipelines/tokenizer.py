"""Text to ids: a sentencepiece model in LLaMA's layout or a tokenizer.json, and the four ids behind its pieces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import tokenizers

from conf import UserError

SENTENCEPIECE, JSON, JSON_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
LLAMA_LAYOUT = (0, 1, 2)


class Tokenizer:
    """A sentencepiece ``tokenizer.model`` with unk 0, bos 1, eos 2, as of LLaMA 1 and 2, or a ``tokenizer.json`` as of
    LLaMA 3, beside a ``tokenizer_config.json`` that names bos and eos.

    path: of the one or the other, or of a folder; of one that holds both, the first counts.

    text_vocab_size: pieces of the model (T); the ids of ``[PAD]``, ``[IMG]``, ``[/IMG]`` and ``<image>`` are T..T+3, in
    the order of Emu's released code. files: all that is needed to open it again, by the names they must have. digest:
    sha256 of what ids depend on.

    Raises UserError when a file is missing, is no tokenizer or has another layout.
    """

    def __init__(self, path: str | Path) -> None:
        path = _file_of(Path(path))
        serialized = _read(path)
        self._model: sentencepiece.SentencePieceProcessor | _JsonModel
        if path.suffix == ".json":
            self._model = _load_json(serialized, path)
            self.files = {JSON: path, JSON_CONFIG: path.with_name(JSON_CONFIG)}
            serialized += f"{self._model.bos_id()} {self._model.eos_id()}".encode()
        else:
            self._model = _load_sentencepiece(serialized, path)
            self.files = {SENTENCEPIECE: path}
        self.digest = hashlib.sha256(serialized).hexdigest()
        self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
        self.text_vocab_size = self._model.get_piece_size()
        self.pad = self.text_vocab_size
        self.img_start = self.text_vocab_size + 1
        self.img_end = self.text_vocab_size + 2
        self.image = self.text_vocab_size + 3

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of every text, without ``<s>`` and ``</s>``; a special token spelt in a text is plain text."""
        return [self._model.encode(text) for text in texts]  # for a list, either library would start threads

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; what is no text piece (pictures, padding) is left out."""
        return self._model.decode([int(i) for i in ids if i < self.text_vocab_size])


class _JsonModel:
    """A tokenizer of the tokenizers library, under sentencepiece's names."""

    def __init__(self, model: tokenizers.Tokenizer, bos: int, eos: int) -> None:
        self._model, self._bos, self._eos = model, bos, eos
        self._model.encode_special_tokens = True  # means: as the text that they are

    def bos_id(self) -> int:
        return self._bos

    def eos_id(self) -> int:
        return self._eos

    def get_piece_size(self) -> int:
        return 1 + max(self._model.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (SENTENCEPIECE, JSON):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds no {SENTENCEPIECE} and no {JSON}: set data.tokenizer to a folder or file that does")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the tokenizer {path} cannot be read ({error.strerror}): set data.tokenizer to a {SENTENCEPIECE} or a "
            f"{JSON}, or to the folder of one"
        ) from error


def _load_sentencepiece(serialized: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(serialized)
    except RuntimeError as error:
        raise UserError(
            f"{path} is no sentencepiece model: set data.tokenizer to the {SENTENCEPIECE} of LLaMA 1 or 2, or to the "
            f"{JSON} of a later model"
        ) from error
    if (model.unk_id(), model.bos_id(), model.eos_id()) != LLAMA_LAYOUT:
        raise UserError(
            f"{path} does not have unk 0, bos 1, eos 2: set data.tokenizer to a tokenizer.model in LLaMA's layout"
        )
    return model


def _load_json(serialized: bytes, path: Path) -> _JsonModel:
    config = path.with_name(JSON_CONFIG)
    try:
        model = tokenizers.Tokenizer.from_buffer(serialized)
    except Exception as error:  # whatever its Rust side finds wrong
        raise UserError(f"{path} is no tokenizer ({error}): set data.tokenizer to a model's {JSON}") from error
    try:
        named = json.loads(_read(config))
        bos, eos = (model.token_to_id(_spelling(named[f"{which}_token"])) for which in ("bos", "eos"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} does not name bos_token and eos_token: take the model's own") from error
    if bos is None or eos is None:
        raise UserError(f"{path} lacks the bos_token or eos_token of {config}: take both from one model's folder")
    return _JsonModel(model, bos, eos)


def _spelling(token: str | dict[str, str]) -> str:
    return token["content"] if isinstance(token, dict) else token
