"""A tokenizer as LLaMA 3 has it: byte-level BPE in a tokenizer.json, its special tokens behind the pieces."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from tests.data_pipelines.corpora import sentence

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
WORDS = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")


def write_byte_level(folder: Path) -> tokenizers.Tokenizer:
    """Fill the folder; returned is the tokenizer without any special token, so that all text is plain to it."""
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    plain.train_from_iterator([sentence(i) for i in range(100)], trainer)
    whole = tokenizers.Tokenizer.from_str(plain.to_str())
    whole.add_special_tokens([AddedToken(BOS), AddedToken(EOS), AddedToken("<|reserved_special_token_0|>")])
    whole.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, whole.token_to_id(BOS))]
    )
    folder.mkdir(exist_ok=True)
    whole.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": {"content": EOS, "special": True}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return plain
