"""Drawn scenes with captions, in the form that img2dataset writes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

from data_pipelines.prepare.demo_corpora.shards import Sample, encode_image, encode_json, rng_of
from data_pipelines.prepare.drawing import draw_scene
from data_pipelines.prepare.drawn_world import caption_scene, random_scene

SIDE = 128
SHARE_OF_OBJECT_COUNTS = {1: 0.40, 2: 0.55, 3: 0.05}
SAMPLES_PER_SHARD = 1000


def samples(count: int, seed: int) -> Iterator[Sample]:
    """``count`` scenes of one to three objects; keys count on through the shards."""
    for number in range(count):
        rng = rng_of("laion", seed, number)
        (num_objects,) = rng.choices(*zip(*SHARE_OF_OBJECT_COUNTS.items(), strict=True))
        scene = random_scene(rng, num_objects)
        caption = caption_scene(scene, rng)
        picture = encode_image(draw_scene(scene, SIDE, rng))
        shard, row = divmod(number, SAMPLES_PER_SHARD)
        key = f"{shard:05d}{row:04d}"
        meta = encode_json(_img2dataset_meta(key, caption, picture, rng))
        yield Sample(key, {"jpg": picture, "json": meta, "txt": caption.encode()}, (caption,))


def _img2dataset_meta(key: str, caption: str, picture: bytes, rng: random.Random) -> dict[str, Any]:
    """Keys in img2dataset's order for LAION-2B's columns; the three scores are made up, as no scorer is at hand."""
    return {
        "WIDTH": SIDE,
        "HEIGHT": SIDE,
        "similarity": round(rng.uniform(0.30, 0.42), 6),
        "punsafe": round(rng.uniform(0, 0.01), 6),
        "pwatermark": round(rng.uniform(0, 0.2), 6),
        "caption": caption,
        "url": f"https://drawn-world.invalid/{key}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": SIDE,
        "height": SIDE,
        "original_width": SIDE,
        "original_height": SIDE,
        "exif": "{}",
        "sha256": hashlib.sha256(picture).hexdigest(),
    }


def shard_stats(numbers: range) -> dict[str, Any]:
    """Content of the ``_stats.json`` beside the shard that holds the samples of these numbers."""
    return {
        "count": len(numbers),
        "successes": len(numbers),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": len(numbers)},
    }
