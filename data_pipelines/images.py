"""Pictures to pixels. libjpeg-turbo decodes JPEGs; Pillow decodes the rest, and the JPEGs that it finds fault with."""

from __future__ import annotations

import numpy as np
import PIL.Image
import simplejpeg
import torch

from data_pipelines.document import Image
from data_pipelines.headers import DecodeError, box_is_inside, check_pixels, jpeg_size, open_image

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
JPEG_SCALES = (8, 4, 2)
SCALE_MARGIN = 1.5
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides stay this many times the target. Photographs then
differ from a full decode by less than 2/255 on average; at 1.0 many differ by 3, for little time saved."""


def decode_image(picture: Image, image_size: int, max_pixels: int) -> np.ndarray:
    """uint8 [3, image_size, image_size] of a picture or of its box; raises `DecodeError`.

    Shown upright (EXIF), on white where transparent, the first frame of an animation.
    """
    min_side = None if picture.box else image_size
    return resize_to_square(cut_box(decode_rgb(picture.encoded, max_pixels, min_side), picture.box), image_size)


def decode_rgb(encoded: bytes, max_pixels: int, min_side: int | None = None) -> np.ndarray:
    """The whole picture, uint8 [H, W, 3]; raises `DecodeError`.

    min_side: pixels that both sides will be resized to: a large JPEG may come smaller than it is, never below that.
    """
    rgb = _decode_jpeg(encoded, max_pixels, min_side)
    return _decode_with_pillow(encoded, max_pixels) if rgb is None else rgb


def cut_box(rgb: np.ndarray, box: tuple[int, int, int, int] | None) -> np.ndarray:
    """The tile at (left, upper, right, lower): cut before the resize, whose filter would bleed over its border."""
    if box is None:
        return rgb
    height, width, _ = rgb.shape
    if not box_is_inside(box, (width, height)):
        raise DecodeError("tile outside its sheet")
    left, upper, right, lower = box
    return rgb[upper:lower, left:right]


def resize_to_square(rgb: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [3, image_size, image_size], channels-last, as `resize_into` has it."""
    out = np.empty((image_size, image_size, 3), np.uint8).transpose(2, 0, 1)
    resize_into(out, rgb)
    return out


def resize_into(out: np.ndarray, rgb: np.ndarray) -> None:
    """uint8 [H, W, 3] -> out, uint8 [3, S, S]: bicubic, aspect ratio not kept, as in Emu's own code.

    torch's filter is Pillow's and takes a fraction of the time. `out` should be channels-last in memory: to make planes
    of the pixels, which is all that F.interpolate can give, takes as long as the resize of a small picture.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(rgb)[None]).permute(0, 3, 1, 2)
    torch.ops.aten._upsample_bicubic2d_aa.out(pixels, out.shape[1:], False, None, None, out=torch.from_numpy(out[None]))


def _decode_jpeg(encoded: bytes, max_pixels: int, min_side: int | None) -> np.ndarray | None:
    """None = a matter for Pillow: no JPEG, CMYK, or with any fault, which Pillow forgives or not."""
    size = jpeg_size(encoded)
    if size is None:
        return None
    check_pixels(size, max_pixels)
    scale = _jpeg_scale(size, min_side)
    try:
        rgb = simplejpeg.decode_jpeg(
            encoded, "RGB", min_width=-(-size[0] // scale), min_height=-(-size[1] // scale), min_factor=scale
        )
    except Exception:  # as in jpeg_size
        return None
    if not _may_tell_orientation(encoded):
        return rgb
    with open_image(encoded, max_pixels) as image:
        return _upright(rgb, _orientation(image))


def _jpeg_scale(size: tuple[int, int], min_side: int | None) -> int:
    if min_side is None:
        return 1
    return next((scale for scale in JPEG_SCALES if min(size) >= scale * SCALE_MARGIN * min_side), 1)


def _may_tell_orientation(encoded: bytes) -> bool:
    """Whether a segment before the image data can be EXIF or XMP (APP1); Pillow's look at it costs more than this."""
    position = 2
    while (start := encoded[position : position + 4]).startswith(b"\xff"):
        if start[1:2] == b"\xda":
            return False
        if start[1:2] == b"\xe1":
            return True
        position += 2 + int.from_bytes(start[2:4], "big")
    return True


def _decode_with_pillow(encoded: bytes, max_pixels: int) -> np.ndarray:
    with open_image(encoded, max_pixels) as image:
        orientation = _orientation(image)
        try:
            image.load()
            return _upright(np.array(_to_rgb(image)), orientation)
        except Exception as error:  # as in jpeg_size
            raise DecodeError("image does not decode") from error


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation; 1 (upright) where the EXIF block is broken, which is no reason to lose the picture."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in TO_UPRIGHT:
        return rgb
    return np.array(PIL.Image.fromarray(rgb).transpose(TO_UPRIGHT[orientation]))


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
