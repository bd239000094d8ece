"""Videos as storyboard sheets with subtitles: raw sheets, and the split form of Emu's own maker."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_pipelines.prepare.demo_corpora.shards import Sample, encode_image, encode_json, rng_of
from data_pipelines.prepare.drawing import draw_background, draw_objects
from data_pipelines.prepare.drawn_world import caption_scene, random_scene

TILE = 96
GRID = 5
SECONDS_PER_TILE = 2.0
SUBTITLE_TEMPLATES = ("{caption}", "{caption} now")


@dataclass(frozen=True)
class Story:
    """Tiles at 0, 2, 4, ... seconds; subtitles as (start in seconds, text)."""

    tiles: list[Image.Image]
    subtitles: list[tuple[float, str]]

    @property
    def duration(self) -> float:
        return len(self.tiles) * SECONDS_PER_TILE

    def subtitle_json(self) -> list[dict[str, Any]]:
        return [{"text": text, "start": start, "duration": SECONDS_PER_TILE} for start, text in self.subtitles]


def samples(form: str, count: int, seed: int) -> Iterator[Sample]:
    """``count`` videos. form: "raw" (whole sheets) or "split" (single frames with the text before each)."""
    for number in range(count):
        rng = rng_of("storyboard", form, seed, number)
        video_id = hashlib.md5(f"{form}/{seed}/{number}".encode()).hexdigest()[:11]
        story = _random_story(rng)
        members = _raw_members(video_id, story, ("webp", "jpg")[number % 2]) if form == "raw" else {}
        yield Sample(
            video_id,
            members or _split_members(video_id, story),
            tuple(text for _, text in story.subtitles),
        )


def _random_story(rng: random.Random) -> Story:
    """Shots of two to four tiles; each is described a moment before or after it begins."""
    num_tiles = rng.randint(28, 48)
    tiles: list[Image.Image] = []
    subtitles = []
    while len(tiles) < num_tiles:
        scene = random_scene(rng, rng.choice((1, 1, 1, 2)))
        begin = len(tiles) * SECONDS_PER_TILE
        text = rng.choice(SUBTITLE_TEMPLATES).format(caption=caption_scene(scene, rng))
        subtitles.append((max(0.0, round(begin + rng.choice((-0.5, 0.5)), 2)), text))
        background = draw_background(scene.shade, TILE, rng)
        shot = min(rng.randint(2, 4), num_tiles - len(tiles))
        tiles += [draw_objects(background, scene.objects, rng) for _ in range(shot)]
    return Story(tiles, subtitles)


def _sheets(tiles: list[Image.Image]) -> Iterator[tuple[Image.Image, int, int, int]]:
    """(sheet, columns, rows, tiles on it); the last sheet is cropped to the rows, or the one row, that it needs."""
    for begin in range(0, len(tiles), GRID * GRID):
        part = tiles[begin : begin + GRID * GRID]
        columns, rows = min(GRID, len(part)), math.ceil(len(part) / GRID)
        sheet = Image.new("RGB", (columns * TILE, rows * TILE))
        for number, tile in enumerate(part):
            row, column = divmod(number, columns)
            sheet.paste(tile, (column * TILE, row * TILE))
        yield sheet, columns, rows, len(part)


def _raw_members(video_id: str, story: Story, extension: str) -> dict[str, bytes]:
    """``json`` with times and subtitles, ``sb_{i}.webp|jpg`` as a server would send them."""
    members, sheets = {}, []
    for number, (sheet, columns, rows, count) in enumerate(_sheets(story.tiles)):
        members[f"sb_{number}.{extension}"] = encode_image(sheet, {"webp": "WEBP", "jpg": "JPEG"}[extension])
        sheets.append({"columns": columns, "rows": rows, "count": count, "ext": extension})
    meta = {
        "video_id": video_id,
        "url": f"https://drawn-world.invalid/watch/{video_id}",
        "duration": story.duration,
        "storyboard": {
            "level": 2,
            "format_id": "sb0",
            "tile_width": TILE,
            "tile_height": TILE,
            "columns": GRID,
            "rows": GRID,
            "count": len(story.tiles),
            "interval": SECONDS_PER_TILE,
            "interval_source": "given",
            "sheets": sheets,
        },
        "subtitles": story.subtitle_json(),
        "language": "en",
        "is_auto": False,
    }
    return members | {"json": encode_json(meta)}


def _split_members(video_id: str, story: Story) -> dict[str, bytes]:
    """``{i}.png`` and ``{i}.txt`` = what is said between frame i - 1 and frame i, ``final_meta.json``."""
    members = {f"{i}.png": encode_image(tile, "PNG") for i, tile in enumerate(story.tiles)}
    said: list[list[str]] = [[] for _ in range(len(story.tiles) + 1)]
    for start, text in story.subtitles:
        # A subtitle at the very time of a frame comes after it.
        said[min(math.floor(start / SECONDS_PER_TILE) + 1, len(story.tiles))].append(text)
    members |= {f"{i}.txt": " ".join(texts).encode() for i, texts in enumerate(said[:-1])}
    if said[-1]:
        members[f"{len(story.tiles)}.txt"] = " ".join(said[-1]).encode()
    sheets = {
        str(i): [columns * TILE, rows * TILE, columns, rows, count, "webp"]
        for i, (_, columns, rows, count) in enumerate(_sheets(story.tiles))
    }
    meta = {
        "id": video_id,
        "sb": sheets,
        "subtitle": story.subtitle_json(),
        "duration": story.duration,
        "frame_num": len(story.tiles),
    }
    return members | {"final_meta.json": encode_json(meta)}
