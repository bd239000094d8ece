"""Decode the pictures of a row: every video is opened once, every storyboard sheet decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import numpy as np

from data_pipelines.document import Frame, Image, Picture
from data_pipelines.headers import DecodeError
from data_pipelines.images import cut_box, decode_rgb, resize_into
from data_pipelines.video import decode_frames

Decoded = Union[np.ndarray, DecodeError]


def blank_images(num_images: int, image_size: int) -> np.ndarray:
    """uint8 [num_images, 3, image_size, image_size], channels-last as pictures are decoded."""
    return np.zeros((num_images, image_size, image_size, 3), np.uint8).transpose(0, 3, 1, 2)


def decode_pictures(pictures: Sequence[Picture], image_size: int, max_pixels: int) -> list[Decoded]:
    """uint8 [3, image_size, image_size] per picture, or the `DecodeError` that tells why there is none."""
    images = blank_images(len(pictures), image_size)
    errors = decode_into(images, pictures, max_pixels)
    return [errors.get(position, image) for position, image in enumerate(images)]


def decode_into(
    images: Sequence[np.ndarray] | np.ndarray, pictures: Sequence[Picture], max_pixels: int
) -> dict[int, DecodeError]:
    """Decode pictures[i] into images[i], uint8 [3, H, H], channels-last; errors by i, whose images become blank."""
    errors = {}
    for positions in _group_by_file(pictures):
        group = [pictures[position] for position in positions]
        outs = [images[position] for position in positions]
        for position, out, error in zip(positions, outs, _decode_file(group, outs, max_pixels), strict=True):
            if error is not None:
                errors[position] = error
                out[:] = 0
    return errors


def _group_by_file(pictures: Sequence[Picture]) -> list[list[int]]:
    """Positions of the pictures that share one encoded file, told by identity: hashing megabytes would cost."""
    groups: dict[tuple[type, int], list[int]] = {}
    for position, picture in enumerate(pictures):
        encoded = picture.video if isinstance(picture, Frame) else picture.encoded
        groups.setdefault((type(picture), id(encoded)), []).append(position)
    return list(groups.values())


def _decode_file(group: Sequence[Picture], outs: Sequence[np.ndarray], max_pixels: int) -> Sequence[DecodeError | None]:
    image_size = outs[0].shape[-1]
    try:
        frames = [picture for picture in group if isinstance(picture, Frame)]
        if frames:
            for out, pixels in zip(outs, decode_frames(frames[0].video, frames, image_size, max_pixels), strict=True):
                out[:] = pixels
            return [None] * len(group)
        tiles = [picture for picture in group if isinstance(picture, Image)]
        min_side = None if any(tile.box for tile in tiles) else image_size
        sheet = decode_rgb(tiles[0].encoded, max_pixels, min_side)
    except DecodeError as error:
        return [error] * len(group)
    return [_resize_tile(sheet, tile, out) for tile, out in zip(tiles, outs, strict=True)]


def _resize_tile(sheet: np.ndarray, tile: Image, out: np.ndarray) -> DecodeError | None:
    try:
        resize_into(out, cut_box(sheet, tile.box))
    except DecodeError as error:
        return error
    return None
