"""Frames of an encoded video. decord reads (it seeks); PyAV reads the files that decord refuses."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
import PIL.Image

from data_pipelines.document import Frame
from data_pipelines.images import DecodeError, resize_to_square

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except ImportError:  # no wheel for every platform
    decord = None

FILE_SIGNATURES = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV\x01", b"OggS", b"\x00\x00\x01\xba", b"G@")
MP4_ATOMS = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")


def check_video(encoded: bytes) -> str | None:
    """Why the bytes are no video by their first bytes (mp4, mov, matroska, webm, avi, flv, ogg, mpeg), or None."""
    return None if encoded[4:8] in MP4_ATOMS or encoded.startswith(FILE_SIGNATURES) else "not a video"


def decode_frames(video: bytes, frames: Sequence[Frame], image_size: int, max_pixels: int) -> list[np.ndarray]:
    """uint8 [3, image_size, image_size] per frame reference, in the same order; raises `DecodeError`.

    A video with fewer frames than slots gives a frame more than once.
    """
    num_frames = _count_frames(video, max_pixels)
    indices = [frame_index(frame, num_frames) for frame in frames]
    wanted = sorted(set(indices))
    read = _read_with_decord(video, wanted, num_frames) or _read_with_av(video, wanted)
    pixels = {
        index: resize_to_square(PIL.Image.fromarray(rgb), image_size) for index, rgb in zip(wanted, read, strict=True)
    }
    return [pixels[index] for index in indices]


def frame_index(frame: Frame, num_frames: int) -> int:
    """Number of the frame in the video: at its position, else the segment centre by Emu's `get_index` (utils.py)."""
    if frame.position is not None:
        return min(int(frame.position * num_frames), num_frames - 1)
    segment = (num_frames - 1) / frame.slots
    return int(segment / 2) + round(segment * frame.slot)


def _count_frames(video: bytes, max_pixels: int) -> int:
    """Frames that are in the file, counted without decoding; checks the picture size and what the header promises."""
    try:
        with av.open(io.BytesIO(video), mode="r") as container:
            stream = container.streams.video[0]
            size = (stream.codec_context.width, stream.codec_context.height)
            count = sum(packet.size > 0 for packet in container.demux(stream))
            promised = stream.frames
    except Exception as error:  # hostile bytes make a foreign demuxer raise almost anything
        raise DecodeError("video does not open") from error
    if size[0] * size[1] > max_pixels:
        raise DecodeError("video too large")
    if count < max(promised, 1):
        raise DecodeError("video has fewer frames than its header says")
    return count


def _read_with_decord(video: bytes, indices: list[int], num_frames: int) -> list[np.ndarray] | None:
    """RGB frames [H, W, 3], or None when decord refuses. The reader must not cross a fork, so it lives in this call."""
    if decord is None:
        return None
    try:
        reader = decord.VideoReader(io.BytesIO(video), num_threads=1)
        if len(reader) != num_frames:
            return None
        return list(reader.get_batch(indices).asnumpy())
    except Exception:  # as in _count_frames; PyAV has the last word
        return None


def _read_with_av(video: bytes, indices: list[int]) -> list[np.ndarray]:
    """RGB frames [H, W, 3], read from the start: slower than a seek, but right for any container."""
    wanted, found = set(indices), []
    try:
        with av.open(io.BytesIO(video), mode="r") as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found.append(frame.to_ndarray(format="rgb24"))
                if number >= indices[-1]:
                    return found
    except Exception as error:  # as in _count_frames
        raise DecodeError("video does not decode") from error
    raise DecodeError("video has fewer frames than its header says")
