"""Shards of the usual sizes for the data benchmark, made from photographs that ship inside installed packages.

Crops are shrunk or enlarged to the size of a set and get a little noise, without which an enlarged picture would be
smaller as a file, and faster to decode, than a photograph of its size.
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from data_pipelines.prepare.demo_corpora.photos import load_photo
from data_pipelines.prepare.demo_corpora.tokenizer import train_tokenizer

PHOTOS = (
    *("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg"),
    *("motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
NAMES = (*(f"skimage/{name}" for name in PHOTOS), "sklearn/china.jpg", "sklearn/flower.jpg")
VOCABULARY = """
the of in on at by with and from near under old new red blue green white black small large bright dark photo picture
view man woman cat dog horse bird tree flower house street city river lake sea sky mountain road car train boat table
chair cup window door wall light shadow morning evening winter summer sale free best price home design
"""
NOISE, MAX_SIDE = 3.0, 800
CLIP_SIZE, CLIP_FRAMES, CLIP_RATE, NUM_CLIPS = (596, 336), 150, 25, 12
SHEET_COLUMNS, SHEET_ROWS, TILE = 3, 3, (160, 90)

Sample = dict[str, Any]


def make_corpora(folder: Path) -> None:
    """small/, large/, video/, pages/, boards/ and tokenizer.model under `folder`; what is there already is kept."""
    for name, (num_shards, num_samples, make) in SETS.items():
        if not (folder / name).is_dir():
            write_set(folder / name, num_shards, num_samples, make)
    if not (folder / "tokenizer.model").exists():
        rng = random.Random("tokenizer")
        train_tokenizer([sentence(rng) for _ in range(2000)], folder / "tokenizer.model")


def write_set(folder: Path, num_shards: int, num_samples: int, make: Callable[[random.Random], Sample]) -> None:
    """By webdataset's own writer, as img2dataset and video2dataset do."""
    unfinished = folder.with_name(f"{folder.name}.tmp")
    unfinished.mkdir(parents=True, exist_ok=True)
    progress = tqdm(total=num_shards * num_samples, desc=f"make {folder.name}", unit="sample", disable=None)
    for shard in range(num_shards):
        with TarWriter(str(unfinished / f"{shard:05d}.tar")) as writer:
            for number in range(num_samples):
                key = f"{shard:05d}{number:04d}"
                writer.write({"__key__": key, **make(random.Random(f"{folder.name} {key}"))})
                progress.update()
    progress.close()
    unfinished.rename(folder)


def sentence(rng: random.Random, shortest: int = 4, longest: int = 18) -> str:
    return " ".join(rng.choices(VOCABULARY.split(), k=rng.randint(shortest, longest)))


@functools.cache
def _photo(name: str) -> Image.Image:
    return load_photo(name)


def crop(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    photo = _photo(rng.choice(NAMES))
    shrink = min(photo.width / size[0], photo.height / size[1]) * rng.uniform(0.6, 1.0)
    width, height = round(size[0] * shrink), round(size[1] * shrink)
    left, upper = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    crop = photo.resize(size, Image.Resampling.LANCZOS, (left, upper, left + width, upper + height))
    noise = np.roll(_noise(), rng.randrange(MAX_SIDE), axis=1)[: size[1], : size[0]]
    return Image.fromarray((np.asarray(crop, np.int16) + noise).clip(0, 255).astype(np.uint8))


@functools.cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).normal(0, NOISE, (MAX_SIDE, MAX_SIDE, 1)).astype(np.int16)


def jpeg(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _pair(rng: random.Random, sides: tuple[int, int], quality: int) -> Sample:
    """Members and json as img2dataset leaves them."""
    width, height = rng.randint(*sides), rng.randint(*sides)
    caption = sentence(rng)
    meta = {
        "caption": caption,
        "url": "https://photographs.invalid/0.jpg",
        "key": "0",
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": f"{rng.getrandbits(256):064x}",
    }
    return {"jpg": jpeg(crop(rng, (width, height)), quality), "txt": caption, "json": meta}


def _clip(rng: random.Random) -> Sample:
    """One of a few clips, which are slow to make."""
    caption = sentence(rng)
    return {"mp4": encoded_clip(rng.randrange(NUM_CLIPS)), "txt": caption, "json": {"caption": caption}}


@functools.cache
def encoded_clip(number: int) -> bytes:
    """H.264 with x264's own distance of key frames, of WebVid's size: a slow pan over a photograph."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=CLIP_RATE)
        video.width, video.height = CLIP_SIZE
        video.pix_fmt = "yuv420p"
        video.options = {"crf": "23", "preset": "veryfast", "threads": "1"}
        for frame in _pan(random.Random(f"clip {number}")):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def _pan(rng: random.Random) -> Iterator[np.ndarray]:
    width, height = CLIP_SIZE
    wide = np.asarray(crop(rng, (width + CLIP_FRAMES, height + CLIP_FRAMES // 2)))
    for number in range(CLIP_FRAMES):
        yield np.ascontiguousarray(wide[number // 2 : number // 2 + height, number : number + width])


def _page(rng: random.Random) -> Sample:
    """MMC4 in its lean form."""
    num_pictures = rng.choice((1, 1, 2, 3, 4, 5))
    sentences = [sentence(rng, 6, 24) for _ in range(rng.randint(num_pictures, 24))]
    infos = [
        {"image_name": f"{n}.jpg", "matched_text_index": place, "matched_sim": 0.35}
        for n, place in enumerate(rng.sample(range(len(sentences)), num_pictures))
    ]
    similarity = [[0.35 if t == info["matched_text_index"] else 0.1 for t in range(len(sentences))] for info in infos]
    page = {"url": "", "text_list": sentences, "image_info": infos, "similarity_matrix": similarity}
    pictures = {f"{n}.jpg": jpeg(crop(rng, (256, 256)), 88) for n in range(num_pictures)}
    return {**pictures, "json": page}


def _board(rng: random.Random) -> Sample:
    """A storyboard before it is cut: one sheet and its subtitles."""
    num_tiles = SHEET_COLUMNS * SHEET_ROWS
    grid = {"columns": SHEET_COLUMNS, "rows": SHEET_ROWS, "count": num_tiles}
    meta = {
        "storyboard": {"tile_width": TILE[0], "tile_height": TILE[1], "sheets": [grid], "interval": 5.0},
        "duration": 5.0 * num_tiles,
        "subtitles": [{"start": 4.0 * n, "text": sentence(rng)} for n in range(num_tiles)],
    }
    sheet = crop(rng, (SHEET_COLUMNS * TILE[0], SHEET_ROWS * TILE[1]))
    return {"json": meta, "sb_0.jpg": jpeg(sheet, 80)}


# name -> shards, samples of each, and what makes one
SETS: dict[str, tuple[int, int, Callable[[random.Random], Sample]]] = {
    "small": (8, 192, functools.partial(_pair, sides=(200, 256), quality=85)),
    "large": (8, 48, functools.partial(_pair, sides=(512, 768), quality=88)),
    "video": (4, 12, _clip),
    "pages": (4, 96, _page),
    "boards": (2, 32, _board),
}
