"""Pictures: a cheap look at the header before packing, the full decode to pixels after it."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image

from data_pipelines.document import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
WHITE = (255, 255, 255)
EXIF_ORIENTATION = 0x0112
TO_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

# check_size applies data.max_image_megapixels; Pillow's own fixed limit would warn, or refuse what the user allows.
PIL.Image.MAX_IMAGE_PIXELS = None


class DecodeError(Exception):
    """A picture that cannot be decoded; ``reason`` is a short fixed phrase (a key of the counters)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_image(encoded: bytes, max_pixels: int, min_side: int = 1) -> str | None:
    """Why a picture must not be used, as far as its header tells, or None. Nothing is decoded."""
    try:
        header_size(encoded, max_pixels, min_side)
    except DecodeError as error:
        return error.reason
    return None


def header_size(encoded: bytes, max_pixels: int, min_side: int = 1) -> tuple[int, int]:
    """Width and height by the header, within the limits; raises `DecodeError`."""
    with _open(encoded, max_pixels) as image:
        if min(image.size) < min_side:
            raise DecodeError("image too small")
        return image.size


def decode_image(picture: Image, image_size: int, max_pixels: int) -> np.ndarray:
    """uint8 [3, image_size, image_size] of a picture or of its box; raises `DecodeError`.

    Shown upright (EXIF), on white where transparent, the first frame of an animation.
    """
    return resize_to_square(cut_box(decode_rgb(picture.encoded, max_pixels), picture.box), image_size)


def decode_rgb(encoded: bytes, max_pixels: int) -> PIL.Image.Image:
    """The whole picture in mode RGB; raises `DecodeError`."""
    with _open(encoded, max_pixels) as image:
        orientation = _orientation(image)
        try:
            image.load()
            upright = image.transpose(TO_UPRIGHT[orientation]) if orientation in TO_UPRIGHT else image
            return _to_rgb(upright)
        except Exception as error:  # hostile bytes make a foreign decoder raise almost anything
            raise DecodeError("image does not decode") from error


def cut_box(image: PIL.Image.Image, box: tuple[int, int, int, int] | None) -> PIL.Image.Image:
    """The tile at (left, upper, right, lower): cut before the resize, whose filter would bleed over its border."""
    if box is None:
        return image
    if not box_is_inside(box, image.size):
        raise DecodeError("tile outside its sheet")
    return image.crop(box)


def box_is_inside(box: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
    left, upper, right, lower = box
    return 0 <= left < right <= size[0] and 0 <= upper < lower <= size[1]


def resize_to_square(image: PIL.Image.Image, image_size: int) -> np.ndarray:
    """RGB picture -> uint8 [3, image_size, image_size]: bicubic, aspect ratio not kept, as in Emu's own code."""
    resized = image.resize((image_size, image_size), PIL.Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _open(encoded: bytes, max_pixels: int) -> PIL.Image.Image:
    try:
        image = PIL.Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Exception as error:  # as in decode_rgb: hostile headers
        raise DecodeError("not an image") from error
    if image.width * image.height > max_pixels:
        raise DecodeError("image too large")
    return image


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation; 1 (upright) where the EXIF block is broken, which is no reason to lose the picture."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = PIL.Image.new("RGB", image.size, WHITE)
        background.paste(rgba, mask=rgba.getchannel("A"))
        return background
    return image.convert("RGB")


def _from_16_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """16-bit gray -> 8-bit gray. Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).clip(0, 65535).astype(np.uint32)
    return PIL.Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
