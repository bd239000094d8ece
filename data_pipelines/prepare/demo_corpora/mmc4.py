"""Pages of sentences and pictures: as OpenFlamingo's converter writes MMC4, and in the lean form without base64."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Iterator
from typing import Any

from data_pipelines.prepare.demo_corpora.shards import Sample, encode_image, encode_json, rng_of
from data_pipelines.prepare.drawing import draw_scene
from data_pipelines.prepare.drawn_world import Scene, caption_scene, random_scene

SIDE = 128
STRAY_SHARE = 0.1
LINKING = ("look at the next picture.", "now there is one more.", "here is one more picture.", "this is the next one.")
OPENING = ("here are some pictures.", "this page is of shapes.", "look at the pictures.", "")
CLOSING = ("that is all.", "", "")


def samples(form: str, count: int, seed: int) -> Iterator[Sample]:
    """``count`` pages. form: "openflamingo" (pictures inside the json) or "lean" (pictures as members)."""
    for number in range(count):
        rng = rng_of("mmc4", form, seed, number)
        key = hashlib.md5(f"{form}/{seed}/{number}".encode()).hexdigest()
        page, pictures = _page(key, rng)
        if form == "openflamingo":
            for info, picture in zip(page["image_info"], pictures, strict=True):
                info["image_base64"] = base64.b64encode(picture).decode()
            members = {"json": encode_json(page)}
        else:
            members = {f"{i}.jpg": picture for i, picture in enumerate(pictures)} | {"json": encode_json(page)}
        yield Sample(key, members, (" ".join(page["text_list"]),))


def _page(key: str, rng: random.Random) -> tuple[dict[str, Any], list[bytes]]:
    """A page and its JPEGs, in the order of image_info, which is never the order of the text."""
    scenes = [random_scene(rng, rng.choice((1, 1, 2))) for _ in range(rng.randint(2, 5))]
    sentences, described_at = _sentences(scenes, rng)
    order = list(range(len(scenes)))
    while order == sorted(order):
        rng.shuffle(order)
    infos, matrix, pictures = [], [], []
    for i, k in enumerate(order):
        stray = rng.random() < STRAY_SHARE
        scores = _scores(len(sentences), described_at[k], stray, rng)
        name = f"{key[:10]}{i:02d}.jpg"
        infos.append(
            {
                "image_name": name,
                "raw_url": f"https://drawn-world.invalid/{name}",
                "matched_text_index": described_at[k],
                "matched_sim": scores[described_at[k]],
                "face_detections": None,
            }
        )
        matrix.append(scores)
        pictures.append(encode_image(draw_scene(random_scene(rng, 1) if stray else scenes[k], SIDE, rng)))
    page = {
        "url": f"https://drawn-world.invalid/{key}.html",
        "text_list": sentences,
        "image_info": infos,
        "similarity_matrix": matrix,
        "could_have_url_duplicate": 0,
    }
    return page, pictures


def _sentences(scenes: list[Scene], rng: random.Random) -> tuple[list[str], list[int]]:
    """The page's sentences, and which of them describes each scene."""
    sentences = [rng.choice(OPENING)]
    described_at = []
    for number, scene in enumerate(scenes):
        if number and rng.random() < 0.3:
            sentences.append(rng.choice(LINKING))
        described_at.append(len(sentences) - (not sentences[0]))
        sentences.append(caption_scene(scene, rng) + ".")
    return [sentence for sentence in [*sentences, rng.choice(CLOSING)] if sentence], described_at


def _scores(num_sentences: int, match: int, stray: bool, rng: random.Random) -> list[float]:
    """Stand-ins for CLIP similarities: 0.33 or more with the matching sentence, less for a stray picture."""
    scores = [round(rng.uniform(0.05, 0.2), 6) for _ in range(num_sentences)]
    scores[match] = round(rng.uniform(0.21, 0.31) if stray else rng.uniform(0.33, 0.42), 6)
    return scores
