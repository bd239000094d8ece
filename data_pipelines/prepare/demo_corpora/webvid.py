"""Clips of a shape that moves from one place to another, in the form that video2dataset writes."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import av
import numpy as np
from PIL import Image

from data_pipelines.prepare.demo_corpora.shards import Sample, encode_json, rng_of
from data_pipelines.prepare.drawing import Stroke, draw_background, paint, place_centre, random_stroke
from data_pipelines.prepare.drawn_world import (
    COLOURS,
    PLACES,
    SHADES,
    SHAPES,
    SIZES,
    DrawnObject,
    is_held_out,
    noun_phrase,
)

SIDE = 128
FRAMES_PER_SECOND = 12
FRAMES = 18
TEMPLATES = ("{np} moves from the {start} to the {end}", "from the {start} {np} moves to the {end}")
SAMPLES_PER_SHARD = 200
# Which samples failed, as in other people's tars: they keep their json and txt.
FAILURES = {7: "failed_to_download", 18: "failed_to_subsample"}
FAILURES_PERIOD = 50


def status_of(number: int) -> str:
    return FAILURES.get(number % FAILURES_PERIOD, "success")


def samples(count: int, seed: int) -> Iterator[Sample]:
    """``count`` clips, a few of them failed: without ``.mp4``."""
    moves = trained_moves()
    for number in range(count):
        rng = rng_of("webvid", seed, number)
        colour, shape, start, end = rng.choice(moves)
        thing = DrawnObject(colour, shape, rng.choice(SIZES), start)
        caption = rng.choice(TEMPLATES).format(np=noun_phrase(thing, rng.random() < 0.7), start=start, end=end)
        shard, row = divmod(number, SAMPLES_PER_SHARD)
        key = f"{shard:05d}{row:03d}"
        members = {
            "json": encode_json(_video2dataset_meta(key, caption, status_of(number))),
            "txt": caption.encode(),
        }
        if status_of(number) == "success":
            members["mp4"] = encode_mp4(_frames(thing, end, rng))
        yield Sample(key, members, (caption,))


def trained_moves() -> list[tuple[str, str, str, str]]:
    """All (colour, shape, start, end) that come near no place where this shape in this colour is held out."""
    ways = [(start, end, places_on_way(start, end)) for start, end in permutations(PLACES, 2)]
    return [
        (colour, shape, start, end)
        for (start, end, places), colour, shape in product(ways, COLOURS, SHAPES)
        if not any(is_held_out(colour, shape, place) for place in places)
    ]


def places_on_way(start: str, end: str) -> set[str]:
    """Every place that a straight move makes a person think of: the nearest one at each moment, ties included."""
    (x0, y0), (x1, y1) = place_centre(start), place_centre(end)
    seen = set()
    for moment in np.linspace(0, 1, 49):
        here = (x0 + (x1 - x0) * moment, y0 + (y1 - y0) * moment)
        distances = {place: math.dist(here, place_centre(place)) for place in PLACES}
        nearly_nearest = min(distances.values()) + 0.08
        seen |= {place for place, distance in distances.items() if distance < nearly_nearest}
    return seen


def _frames(thing: DrawnObject, end: str, rng: random.Random) -> Iterator[Image.Image]:
    background = draw_background(rng.choice(SHADES), SIDE, rng)
    first = random_stroke(thing, rng)
    last = random_stroke(replace(thing, place=end), rng)
    for moment in np.linspace(0, 1, FRAMES):
        frame = background.copy()
        paint(frame, _between(first, last, float(moment)))
        yield frame


def _between(first: Stroke, last: Stroke, moment: float) -> Stroke:
    return replace(first, x=first.x + (last.x - first.x) * moment, y=first.y + (last.y - first.y) * moment)


def encode_mp4(frames: Iterator[Image.Image]) -> bytes:
    """H.264 in mp4; one thread, because the encoder's output depends on their number."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return out.getvalue()


def _video2dataset_meta(key: str, caption: str, status: str) -> dict[str, Any]:
    """Keys in video2dataset's order for WebVid's columns."""
    return {
        "videoid": 1_000_000 + int(key),
        "page_idx": 1,
        "page_dir": "000001_000050",
        "duration": "PT00H00M01S",
        "caption": caption,
        "url": f"https://drawn-world.invalid/{key}.mp4",
        "key": key,
        "status": status,
        "error_message": None if status == "success" else "made without a video on purpose",
        "yt_meta_dict": None,
    }


def shard_stats(numbers: range) -> dict[str, Any]:
    """Content of the ``_stats.json`` beside the shard that holds the samples of these numbers."""
    statuses = [status_of(number) for number in numbers]
    return {
        "count": len(numbers),
        "successes": statuses.count("success"),
        "failed_to_download": statuses.count("failed_to_download"),
        "failed_to_subsample": statuses.count("failed_to_subsample"),
        "duration": 0.0,
        "bytes_downloaded": 0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {status: statuses.count(status) for status in sorted(set(statuses))},
    }
