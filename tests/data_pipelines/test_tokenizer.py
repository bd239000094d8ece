from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from conf import UserError
from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines.byte_level import BOS, write_byte_level


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


CAPTION_KEYS = ("caption", "top_caption", "all_captions", "text_list", "text", "lines", "title", "description", "tags")
AWKWARD = [
    *("", " ", "  two  spaces  ", "\n", "a line\nand\r\n\tanother\n\n", " leading", "trailing "),
    *("🦜", "👩\u200d👩\u200d👧 in a 🏳️\u200d🌈 boat", "e\u0301 é \ufb01 \uff21\uff22 ① ½", "漢字かな交じり文"),
    *("שלום \u200f\u0639\u0627\u0644\u0645", "\u200b\ufeff\u00a0\u2028", "\ue000\U0010ffff\U000e0041", "\x00\x01\x7f"),
    *("\u2581 \u2581a\u2581", "<0x41> <0xFF>", "a" * 3000, "9" * 50),
    *("<s>", "</s>", "<unk>", "[IMG]", "a <s>[IMG]<image>[/IMG]</s>[PAD] b", "[INST] <<SYS>>"),
    *("<|begin_of_text|>", "a <|end_of_text|><|reserved_special_token_0|> b", "<|eot_id|>"),
]


def captions(content: Any, wanted: bool = False) -> Iterator[str]:
    """Strings under the keys that hold what people read."""
    if isinstance(content, str) and wanted:
        yield content
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from captions(value, key in CAPTION_KEYS)
    for value in content if isinstance(content, list) else ():
        yield from captions(value, wanted)


def real_texts(folder: Path) -> list[str]:
    """Captions, sentences of pages, titles and subtitles, each once."""
    found: set[str] = set()
    for shard in sorted(folder.glob("[!c]*/*.tar")):  # not the corrupt ones
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith((".txt", "json")):
                    text = tar.extractfile(member).read().decode()  # type: ignore[union-attr]
                    found.update([text] if member.name.endswith(".txt") else captions(json.loads(text)))
    return sorted(found - {""})


def test_real_texts_have_the_ids_of_sentencepiece(real_data: Path) -> None:
    path = real_data / "tokenizer" / "tokenizer.model"
    texts = real_texts(real_data)
    assert len(texts) == 1919
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path), add_bos=False, add_eos=False, num_threads=1)
    ours = Tokenizer(path)
    assert ours.encode(texts + AWKWARD) == theirs.encode(texts + AWKWARD, out_type=int)
    assert sum(map(len, ours.encode(texts))) > 15_000, "the comparison would be empty"


def test_awkward_texts_are_text(real_data: Path) -> None:
    """None is lost or becomes a special token; sentencepiece takes its own sign for a space as one."""
    tokenizer = Tokenizer(real_data / "tokenizer" / "tokenizer.model")
    for text, ids in zip(AWKWARD, tokenizer.encode(AWKWARD), strict=True):
        assert all(2 < i < tokenizer.text_vocab_size for i in ids), text
        assert tokenizer.decode(ids) == text.replace("\u2581", " "), text


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tokenizers.Tokenizer]:
    """A folder as LLaMA 3 has it, and its tokenizer without any special token."""
    folder = tmp_path_factory.mktemp("llama-3")
    return folder, write_byte_level(folder)


def test_a_tokenizer_json_gives_the_ids_of_its_library(
    llama_3: tuple[Path, tokenizers.Tokenizer], real_data: Path
) -> None:
    folder, plain = llama_3
    ours = Tokenizer(folder)
    pieces = plain.get_vocab_size()
    assert (ours.bos, ours.eos, ours.text_vocab_size) == (pieces, pieces + 1, pieces + 3)
    assert [ours.pad, ours.img_start, ours.img_end, ours.image] == [pieces + 3 + i for i in range(4)]
    texts = real_texts(real_data)[:1000] + AWKWARD
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids == plain.encode(text).ids
        assert ours.decode([ours.bos, *ids, ours.eos, ours.img_start, ours.image, ours.pad]) == text
    assert Tokenizer(folder / "tokenizer.json").digest == ours.digest


def test_a_folder_with_both_is_read_as_llama_2(tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    write_byte_level(tmp_path)
    shutil.copy(tokenizer_path, tmp_path / "tokenizer.model")
    assert Tokenizer(tmp_path).digest == tokenizer.digest


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            Tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no tokenizer.model and no tokenizer.json" in refusal()
    write_byte_level(tmp_path)
    before, config = Tokenizer(tmp_path).digest, tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": BOS, "eos_token": "<|reserved_special_token_0|>"}))
    assert Tokenizer(tmp_path).digest != before
    for content in ("{", "[]", "{}", f'{{"bos_token": "{BOS}", "eos_token": null}}'):
        config.write_text(content)
        assert "tokenizer_config.json does not name bos_token and eos_token" in refusal()
    config.write_text(f'{{"bos_token": "{BOS}", "eos_token": "</s>"}}')
    assert "lacks the bos_token or eos_token" in refusal()
    config.unlink()
    assert "tokenizer_config.json cannot be read" in refusal()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is no tokenizer" in refusal()


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
