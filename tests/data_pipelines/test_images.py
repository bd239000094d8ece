"""Pictures of every mode and defect to pixels; Pillow used directly is the oracle."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import simplejpeg

from data_pipelines.document import Image
from data_pipelines.headers import DecodeError, check_image
from data_pipelines.images import decode_image, decode_rgb
from data_pipelines.prepare.demo_corpora.photos import load_photo
from tests.data_pipelines.sources_helpers import encode, picture

LIMIT = 64_000_000


def decode(encoded: bytes, size: int = 8, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    return decode_image(Image(encoded, box), size, LIMIT)


def assert_color(pixels: np.ndarray, color: tuple[int, int, int], tolerance: int = 0) -> None:
    difference = np.abs(pixels.astype(int) - np.array(color)[:, None, None])
    assert difference.max() <= tolerance, pixels.reshape(3, -1).mean(axis=1)


def test_resize_is_direct_and_bicubic() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    pixels = decode(encode(PIL.Image.fromarray(noise)), 16)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 16, 16)
    assert np.abs(pixels.astype(int) - with_pillow(PIL.Image.fromarray(noise), 16)).max() <= 1


def with_pillow(image: PIL.Image.Image, size: int) -> np.ndarray:
    """int [3, size, size]: what the resize must come close to."""
    resized = image.convert("RGB").resize((size, size), PIL.Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1).astype(int)


def photo(side: int) -> PIL.Image.Image:
    """A photograph (scikit-image's astronaut) whose shorter side is `side`, with the noise that a camera leaves."""
    image = load_photo("skimage/astronaut.png").resize((side + side // 8, side), PIL.Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 3, (image.height, image.width, 1))
    return PIL.Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [1, 7, 64, 224])
@pytest.mark.parametrize("sides", [(1, 1), (3, 2), (300, 200), (64, 64), (700, 9)])
def test_resize_of_any_shape_is_pillows(sides: tuple[int, int], size: int) -> None:
    image = load_photo("skimage/astronaut.png").resize(sides)
    assert np.abs(decode(encode(image), size).astype(int) - with_pillow(image, size)).mean() < 0.5


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}]
)
@pytest.mark.parametrize("side", [40, 250, 400, 700, 1500])
def test_jpegs_look_as_pillow_decodes_them(side: int, options: dict[str, Any]) -> None:
    """Small ones are decoded whole and so nearly equal; from 672 = 2 * 1.5 * 224 on at 1/2 or 1/4 of their size."""
    encoded = encode(photo(side), "JPEG", **{"quality": 90, **options})
    expected = with_pillow(PIL.Image.open(io.BytesIO(encoded)), 224)
    difference = np.abs(decode(encoded, 224) - expected).mean()
    assert difference < (0.1 if side < 672 else 2)


def test_scaled_decode_is_at_least_half_as_large_again_as_the_target() -> None:
    for width, height in [(335, 400), (400, 671), (672, 672), (1343, 3000), (1344, 1400), (2688, 2688)]:
        encoded = encode(PIL.Image.new("L", (width, height)), "JPEG")
        decoded = decode_rgb(encoded, LIMIT, min_side=224)
        shorter = min(decoded.shape[:2])
        assert shorter == min(width, height) or 336 <= shorter <= 672
        assert decode_rgb(encoded, LIMIT).shape == (height, width, 3)


def test_gray_and_adobe_rgb_jpegs() -> None:
    assert_color(decode(encode(PIL.Image.new("L", (8, 8), 77), "JPEG")), (77, 77, 77))
    rgb = encode(PIL.Image.new("RGB", (8, 8), (200, 30, 60)), "JPEG", keep_rgb=True)
    assert simplejpeg.decode_jpeg_header(rgb)[2] == "RGB"
    assert_color(decode(rgb), (200, 30, 60), tolerance=3)


def test_a_jpeg_with_a_fault_is_what_pillow_makes_of_it() -> None:
    """libjpeg-turbo warns of bytes before a marker, which Pillow reads over, and of a missing end, which it refuses."""
    encoded = encode(photo(64), "JPEG")
    scan = encoded.rindex(b"\xff\xd9")
    for faulty in (encoded[:scan] + b"junk" + encoded[scan:], encoded + b"<html>"):
        expected = with_pillow(PIL.Image.open(io.BytesIO(faulty)), 32)
        assert np.abs(decode(faulty, 32) - expected).max() <= 2
    with pytest.raises(DecodeError, match="image does not decode"):
        decode(encoded[:scan])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [64, 700])
def test_exif_orientation_of_jpegs(orientation: int, side: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(photo(side), "JPEG", quality=95, exif=exif)
    expected = with_pillow(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(encoded))), 224)
    assert np.abs(decode(encoded, 224) - expected).mean() < 2
    whole = decode_rgb(encoded, LIMIT)
    assert (whole.shape[0] > whole.shape[1]) == (orientation >= 5)


def test_orientation_in_xmp() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    encoded = encode(photo(64), "JPEG", xmp=xmp)
    stored = PIL.Image.open(io.BytesIO(encoded))
    assert np.abs(decode(encoded, 32) - with_pillow(stored.rotate(180), 32)).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(format: str) -> None:
    encoded = picture((200, 30, 60), (32, 32), format)
    assert check_image(encoded, LIMIT) is None
    assert_color(decode(encoded), (200, 30, 60), tolerance=4)


def test_other_formats_are_refused() -> None:
    assert check_image(picture(format="PPM"), LIMIT) == "not an image"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = np.zeros((8, 8, 3), dtype=np.uint8)
    upright[:4, :4] = (250, 0, 0)
    upright[:4, 4:] = (0, 250, 0)
    # how a camera stores each orientation (EXIF 2.3, tag 0x0112): row 0 and column 0 of the stored array
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(PIL.Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(decode(encoded), upright.transpose(2, 0, 1))


def test_broken_exif_does_not_lose_the_picture() -> None:
    encoded = encode(PIL.Image.new("RGB", (8, 8), (9, 8, 7)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert_color(decode(encoded), (9, 8, 7), tolerance=2)


def test_transparent_is_white() -> None:
    assert_color(decode(encode(PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0)))), (255, 255, 255))
    assert_color(decode(encode(PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 255)))), (255, 0, 0))
    assert_color(decode(encode(PIL.Image.new("LA", (8, 8), (10, 0)))), (255, 255, 255))
    palette = PIL.Image.new("P", (8, 8), 3)
    palette.putpalette([7] * 768)
    assert_color(decode(encode(palette, transparency=3)), (255, 255, 255))
    assert_color(decode(encode(palette)), (7, 7, 7))


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (25700, 100), (65535, 255)])
def test_16_bit_gray_is_scaled(value: int, expected: int) -> None:
    image = PIL.Image.fromarray(np.full((8, 8), value, dtype=np.uint16))
    assert image.mode == "I;16"
    assert_color(decode(encode(image)), (expected,) * 3)


def test_gray_bilevel_and_cmyk() -> None:
    assert_color(decode(encode(PIL.Image.new("L", (8, 8), 77))), (77, 77, 77))
    assert_color(decode(encode(PIL.Image.new("1", (8, 8), 1))), (255, 255, 255))
    cyan = encode(PIL.Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    assert_color(decode(cyan), (0, 255, 255), tolerance=4)


def test_animation_gives_its_first_frame() -> None:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in [(255, 0, 0), (0, 255, 0)]]
    assert_color(decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])), (255, 0, 0))


def test_box_is_cut_before_the_resize() -> None:
    sheet = PIL.Image.new("RGB", (20, 10), (255, 255, 255))
    sheet.paste((0, 0, 200), (10, 0, 20, 10))
    assert_color(decode(encode(sheet), 32, (10, 0, 20, 10)), (0, 0, 200))


@pytest.mark.parametrize("box", [(10, 0, 21, 10), (-1, 0, 5, 5), (5, 0, 5, 5), (0, 0, 5, 11)])
def test_box_outside_the_sheet(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(DecodeError, match="tile outside its sheet"):
        decode(picture(size=(20, 10)), box=box)


def test_truncated_file_passes_the_header_and_fails_at_decode() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for format in ("JPEG", "PNG", "WEBP"):
        encoded = encode(PIL.Image.fromarray(noise), format)
        with pytest.raises(DecodeError):
            decode(encoded[: len(encoded) // 2])
    assert check_image(encode(PIL.Image.fromarray(noise), "JPEG")[:2000], LIMIT) is None


@pytest.mark.parametrize("encoded", [b"", b"\x89PNG", b"<html>404</html>", b"\xff\xd8\xff", bytes(1000)])
def test_not_an_image(encoded: bytes) -> None:
    assert check_image(encoded, LIMIT) == "not an image"
    with pytest.raises(DecodeError) as caught:
        decode(encoded)
    assert caught.value.reason == "not an image"


def test_bomb_is_refused_by_its_header() -> None:
    """The header promises 30000 x 30000 pixels and no pixel data follows: only a check before decoding can see it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")
    assert PIL.Image.open(io.BytesIO(bomb)).size == (30000, 30000)
    assert check_image(bomb, LIMIT) == "image too large"
    with pytest.raises(DecodeError, match="image too large"):
        decode(bomb)


def test_limits_are_inclusive() -> None:
    for format in ("PNG", "JPEG"):
        encoded = picture(size=(10, 6), format=format)
        assert check_image(encoded, 60, min_side=6) is None
        assert check_image(encoded, 59) == "image too large"
        assert check_image(encoded, 60, min_side=7) == "image too small"
        with pytest.raises(DecodeError, match="image too large"):
            decode_image(Image(encoded), 8, 59)
