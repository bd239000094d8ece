"""A cheap look at pictures and videos before packing: what they are and how large, told without decoding."""

from __future__ import annotations

import io

import PIL.Image
import simplejpeg

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
JPEG_START = b"\xff\xd8\xff"
JPEG_COLORS = ("Gray", "YCbCr", "RGB")
VIDEO_SIGNATURES = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV\x01", b"OggS", b"\x00\x00\x01\xba", b"G@")
MP4_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")

# open_image applies data.max_image_megapixels; Pillow's own fixed limit would warn, or refuse what the user allows.
PIL.Image.MAX_IMAGE_PIXELS = None


class DecodeError(Exception):
    """A picture that cannot be decoded; ``reason`` is a short fixed phrase (a key of the counters)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_video(encoded: bytes) -> str | None:
    """Why the bytes are no video by their first bytes (mp4, mov, matroska, webm, avi, flv, ogg, mpeg), or None."""
    return None if encoded[4:8] in MP4_ATOMS or encoded.startswith(VIDEO_SIGNATURES) else "not a video"


def check_image(encoded: bytes, max_pixels: int, min_side: int = 1) -> str | None:
    """Why a picture must not be used, as far as its header tells, or None."""
    try:
        header_size(encoded, max_pixels, min_side)
    except DecodeError as error:
        return error.reason
    return None


def header_size(encoded: bytes, max_pixels: int, min_side: int = 1) -> tuple[int, int]:
    """Width and height by the header, within the limits; raises `DecodeError`."""
    size = jpeg_size(encoded)
    if size is None:
        with open_image(encoded, max_pixels) as image:
            size = image.size
    check_pixels(size, max_pixels)
    if min(size) < min_side:
        raise DecodeError("image too small")
    return size


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height of a gray or colour JPEG that libjpeg-turbo reads; None = a matter for Pillow."""
    if not encoded.startswith(JPEG_START):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
    except Exception:  # hostile bytes make a foreign decoder raise almost anything
        return None
    return (width, height) if colors in JPEG_COLORS else None


def open_image(encoded: bytes, max_pixels: int) -> PIL.Image.Image:
    """Pillow's image, not yet decoded; raises `DecodeError`."""
    try:
        image = PIL.Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Exception as error:  # as in jpeg_size
        raise DecodeError("not an image") from error
    check_pixels(image.size, max_pixels)
    return image


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise DecodeError("image too large")


def box_is_inside(box: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
    left, upper, right, lower = box
    return 0 <= left < right <= size[0] and 0 <= upper < lower <= size[1]
