"""Pictures to pixels exactly as in training: upright, RGB on white, bicubic to a square, aspect ratio not kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image

from emu_inference.config import UserError

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


def read_image(path: str | Path) -> PIL.Image.Image:
    """The picture as it is in the file, decoded (the first frame of an animation). UserError if that fails."""
    try:
        image = PIL.Image.open(path, formats=FORMATS)
        image.load()
    except FileNotFoundError as error:
        raise UserError(f"there is no image {path}: check the path") from error
    except Exception as error:  # hostile bytes make a foreign decoder raise almost anything
        raise UserError(f"{path} cannot be read as an image ({error}): give a {', '.join(FORMATS)} file") from error
    return image


def to_pixels(image: PIL.Image.Image, image_size: int) -> np.ndarray:
    """uint8 [3, image_size, image_size]."""
    orientation = _orientation(image)
    upright = image.transpose(TO_UPRIGHT[orientation]) if orientation in TO_UPRIGHT else image
    resized = _to_rgb(upright).resize((image_size, image_size), PIL.Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation; 1 (upright) where the EXIF block is broken."""
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
