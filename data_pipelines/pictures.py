"""Decode the pictures of a row: every video is opened once, every storyboard sheet decoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np

from data_pipelines.document import Frame, Image, Picture
from data_pipelines.headers import DecodeError
from data_pipelines.images import cut_box, decode_rgb, resize_to_square
from data_pipelines.video import decode_frames

Decoded = Union[np.ndarray, DecodeError]


def decode_pictures(pictures: Sequence[Picture], image_size: int, max_pixels: int) -> list[Decoded]:
    """uint8 [3, image_size, image_size] per picture, or the `DecodeError` that tells why there is none."""
    results = dict(decode_one_by_one(pictures, image_size, max_pixels))
    return [results[position] for position in range(len(pictures))]


def decode_one_by_one(pictures: Sequence[Picture], image_size: int, max_pixels: int) -> Iterator[tuple[int, Decoded]]:
    """Position and pixels of every picture, file by file: who keeps one at a time finds it in the cache."""
    for positions in _group_by_file(pictures):
        group = [pictures[position] for position in positions]
        yield from zip(positions, _decode_file(group, image_size, max_pixels), strict=True)


def _group_by_file(pictures: Sequence[Picture]) -> list[list[int]]:
    """Positions of the pictures that share one encoded file, told by identity: hashing megabytes would cost."""
    groups: dict[tuple[type, int], list[int]] = {}
    for position, picture in enumerate(pictures):
        encoded = picture.video if isinstance(picture, Frame) else picture.encoded
        groups.setdefault((type(picture), id(encoded)), []).append(position)
    return list(groups.values())


def _decode_file(group: Sequence[Picture], image_size: int, max_pixels: int) -> Sequence[Decoded]:
    try:
        frames = [picture for picture in group if isinstance(picture, Frame)]
        if frames:
            return decode_frames(frames[0].video, frames, image_size, max_pixels)
        tiles = [picture for picture in group if isinstance(picture, Image)]
        min_side = None if any(tile.box for tile in tiles) else image_size
        sheet = decode_rgb(tiles[0].encoded, max_pixels, min_side)
    except DecodeError as error:
        return [error] * len(group)
    return [_decode_tile(sheet, tile, image_size) for tile in tiles]


def _decode_tile(sheet: np.ndarray, tile: Image, image_size: int) -> Decoded:
    try:
        return resize_to_square(cut_box(sheet, tile.box), image_size)
    except DecodeError as error:
        return error
