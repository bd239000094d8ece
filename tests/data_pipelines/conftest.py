"""Fixtures of the data pipeline's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from data_pipelines.config import DataConfig
from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines.corpora import make_config, sentence


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model in LLaMA's layout, trained on the words of the small corpora."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(i) for i in range(400)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> DataConfig:
    return make_config(tmp_path_factory.mktemp("corpora"), tokenizer_path)
