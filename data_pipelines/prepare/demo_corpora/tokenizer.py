"""The demo's small tokenizer: SentencePiece BPE with LLaMA's layout."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 512


def train_tokenizer(texts: Iterable[str], path: Path) -> None:
    """Train on ``texts`` and write ``path``: unk 0, bos 1, eos 2, bytes from 3, no padding, text kept as it is.

    One thread and an in-memory model: neither scheduling nor file names get into the bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
