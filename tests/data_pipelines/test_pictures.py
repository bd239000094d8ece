"""Decoding the pictures of a row: order, sharing, and errors in their places."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from data_pipelines import pictures as module
from data_pipelines.document import Frame, Image, Picture
from data_pipelines.headers import DecodeError
from data_pipelines.images import decode_image
from data_pipelines.pictures import decode_pictures
from data_pipelines.video import decode_frames
from tests.data_pipelines.sources_helpers import clip, encode, frame_number, picture

LIMIT = 10_000_000


def test_every_picture_in_its_place_and_every_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []

    def counted_frames(video: bytes, *rest: object) -> object:
        opened.append(video)
        return decode_frames(video, *rest)  # type: ignore[arg-type]

    def counted_rgb(encoded: bytes, *rest: object) -> object:
        opened.append(encoded)
        return decode_rgb(encoded, *rest)  # type: ignore[arg-type]

    decode_rgb = module.decode_rgb
    monkeypatch.setattr(module, "decode_frames", counted_frames)
    monkeypatch.setattr(module, "decode_rgb", counted_rgb)

    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    sheet, video, broken = encode(PIL.Image.fromarray(noise)), clip(10), b"\xff\xd8 broken"
    row: list[Picture] = [
        Image(sheet, (20, 0, 40, 20)),
        Frame(video, 0, 2, 0.95),
        Image(broken),
        Image(sheet, (0, 0, 20, 20)),
        Image(sheet, (0, 0, 20, 21)),
        Frame(video, 1, 2, 0.25),
        Image(sheet),
    ]
    decoded = decode_pictures(row, 16, LIMIT)

    assert opened == [sheet, video, broken]
    for position in (0, 3, 6):
        np.testing.assert_array_equal(decoded[position], decode_image(row[position], 16, LIMIT))  # type: ignore[arg-type]
    assert [frame_number(decoded[position]) for position in (1, 5)] == [9, 2]  # type: ignore[arg-type]
    reasons = [picture.reason for picture in decoded if isinstance(picture, DecodeError)]
    assert reasons == ["not an image", "tile outside its sheet"]
    assert isinstance(decoded[2], DecodeError) and isinstance(decoded[4], DecodeError)


def test_a_broken_video_fails_all_of_its_frames_and_no_other_picture() -> None:
    broken = b"\0\0\0\x20ftypisom" + bytes(100)
    decoded = decode_pictures([Frame(broken, 0, 2), Image(picture()), Frame(broken, 1, 2)], 16, LIMIT)
    assert isinstance(decoded[0], DecodeError) and isinstance(decoded[2], DecodeError)
    assert isinstance(decoded[1], np.ndarray)


def test_no_pictures() -> None:
    assert decode_pictures([], 16, LIMIT) == []
