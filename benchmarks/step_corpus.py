"""The paper's five corpora in small for the step benchmark: the folder that EMU_DATA names, with web-like text lengths.

A tokenizer of 32,000 pieces knows every word, so a word is a token and lengths are given in tokens. They are
log-normal (median, spread): alt texts, generated captions, MMC4's pages (the corpus has 43e9 tokens in 101e6 documents,
a mean of 426), captions of stock footage, and what is said in five seconds.
"""

from __future__ import annotations

import functools
import io
import math
import random
import string
from pathlib import Path

import sentencepiece

from benchmarks.data_corpora import (
    NUM_CLIPS,
    SHEET_COLUMNS,
    SHEET_ROWS,
    TILE,
    Sample,
    crop,
    encoded_clip,
    jpeg,
    write_set,
)

VOCABULARY, NUM_CONTROL_PIECES, WORD_LETTERS = 32_000, 3, 4
ALT_TEXT, GENERATED, STOCK, SPOKEN = (14, 0.6), (12, 0.2), (17, 0.5), (16, 0.4)
PAGE, SENTENCE = (285, 0.9), (20, 0.5)
PICTURES_OF_A_PAGE = (1, 1, 1, 2, 2, 3, 4, 6, 10)
PICTURE_SIZE, INTERVAL_S = (256, 256), 5.0


def make_corpora(folder: Path) -> None:
    """What is there already is kept."""
    for name, (num_shards, num_samples, make) in SETS.items():
        if not (folder / name).is_dir():
            write_set(folder / name, num_shards, num_samples, make)
    tokenizer = folder / "tokenizer" / "tokenizer.model"
    if not tokenizer.exists():
        tokenizer.parent.mkdir()
        tokenizer.write_bytes(word_tokenizer())


def word_tokenizer() -> bytes:
    """A sentencepiece model in LLaMA's layout."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words()),
        model_writer=model,
        model_type="word",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def words() -> list[str]:
    rng, found = random.Random("words"), dict[str, None]()
    while len(found) < VOCABULARY - NUM_CONTROL_PIECES:
        found["".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS))] = None
    return list(found)


def text(rng: random.Random, lengths: tuple[float, float]) -> str:
    return " ".join(rng.choices(words(), k=draw_length(rng, lengths)))


def draw_length(rng: random.Random, lengths: tuple[float, float]) -> int:
    median, spread = lengths
    return max(2, round(rng.lognormvariate(math.log(median), spread)))


def _picture(rng: random.Random) -> bytes:
    return jpeg(crop(rng, PICTURE_SIZE), 85)


def _pair(rng: random.Random) -> Sample:
    return {"jpg": _picture(rng), "txt": text(rng, ALT_TEXT), "json": {"status": "success"}}


def _captioned(rng: random.Random) -> Sample:
    """LAION-COCO keeps the alt text beside the caption that a model wrote."""
    return {"jpg": _picture(rng), "txt": text(rng, ALT_TEXT), "json": {"top_caption": text(rng, GENERATED)}}


def _clip(rng: random.Random) -> Sample:
    return {"mp4": encoded_clip(rng.randrange(NUM_CLIPS)), "txt": text(rng, STOCK), "json": {}}


def _page(rng: random.Random) -> Sample:
    """MMC4 in its lean form; pictures belong to sentences of their own."""
    length, sentences = draw_length(rng, PAGE), list[str]()
    while sum(len(sentence.split()) for sentence in sentences) < length:
        sentences.append(text(rng, SENTENCE))
    num_pictures = min(rng.choice(PICTURES_OF_A_PAGE), len(sentences))
    places = rng.sample(range(len(sentences)), num_pictures)
    infos = [
        {"image_name": f"{n}.jpg", "matched_text_index": place, "matched_sim": 0.35} for n, place in enumerate(places)
    ]
    page = {"url": "", "text_list": sentences, "image_info": infos}
    return {**{f"{n}.jpg": _picture(rng) for n in range(num_pictures)}, "json": page}


def _board(rng: random.Random) -> Sample:
    num_tiles = SHEET_COLUMNS * SHEET_ROWS
    grid = {"columns": SHEET_COLUMNS, "rows": SHEET_ROWS, "count": num_tiles}
    meta = {
        "storyboard": {"tile_width": TILE[0], "tile_height": TILE[1], "sheets": [grid], "interval": INTERVAL_S},
        "duration": INTERVAL_S * num_tiles,
        "subtitles": [{"start": INTERVAL_S * n, "text": text(rng, SPOKEN)} for n in range(num_tiles)],
    }
    return {"json": meta, "sb_0.jpg": jpeg(crop(rng, (SHEET_COLUMNS * TILE[0], SHEET_ROWS * TILE[1])), 80)}


# folder -> shards, samples of each, and what makes one
SETS = {
    "laion": (2, 128, _pair),
    "laion_coco": (2, 128, _captioned),
    "mmc4": (2, 64, _page),
    "webvid": (2, 16, _clip),
    "yt_storyboard": (2, 16, _board),
}
