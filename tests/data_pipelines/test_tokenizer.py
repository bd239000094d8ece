from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import sentencepiece

from conf import UserError
from data_pipelines.tokenizer import Tokenizer


def test_special_ids_follow_the_pieces(tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path)).get_piece_size()
    assert tokenizer.text_vocab_size == pieces
    assert [tokenizer.pad, tokenizer.img_start, tokenizer.img_end, tokenizer.image] == [pieces + i for i in range(4)]
    assert tokenizer.digest == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()


def test_encode_gives_text_pieces_only_and_decode_returns_the_text(tokenizer: Tokenizer) -> None:
    texts = ["a red square", "", "</s> [IMG] <image> zebra é"]
    encoded = tokenizer.encode(texts)
    assert encoded[1] == []
    assert tokenizer.encode([]) == []
    for text, ids in zip(texts, encoded, strict=True):
        assert not {tokenizer.bos, tokenizer.eos} & set(ids)
        assert all(i < tokenizer.text_vocab_size for i in ids)
        assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.img_start, tokenizer.image, tokenizer.pad]) == text


def test_real_llama_like_tokenizer(real_data: Path) -> None:
    tokenizer = Tokenizer(real_data / "tokenizer" / "tokenizer.model")
    assert (tokenizer.pad, tokenizer.img_start, tokenizer.img_end, tokenizer.image) == (32000, 32001, 32002, 32003)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path / "missing.model")
    for content in (b"", b"no model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match="no sentencepiece model"):
            Tokenizer(tmp_path / "bad.model")


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 20),
        model_prefix=str(tmp_path / "other"),
        vocab_size=16,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="unk 0, bos 1, eos 2"):
        Tokenizer(tmp_path / "other.model")
