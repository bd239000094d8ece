"""Frames of an encoded video. decord reads (it seeks); PyAV reads the files that decord refuses."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np

from data_pipelines.document import Frame
from data_pipelines.headers import DecodeError
from data_pipelines.images import resize_to_square

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except ImportError:  # no wheel for every platform
    decord = None


def decode_frames(video: bytes, frames: Sequence[Frame], image_size: int, max_pixels: int) -> list[np.ndarray]:
    """uint8 [3, image_size, image_size] per frame reference, in the same order; raises `DecodeError`.

    A video with fewer frames than slots gives a frame more than once.
    """
    promised = _read_header(video, max_pixels)
    pixels = _read_with_decord(video, frames, promised, image_size)
    return pixels or _read_with_av(video, frames, promised, image_size)


def frame_index(frame: Frame, num_frames: int) -> int:
    """Number of the frame in the video: at its position, else the segment centre by Emu's `get_index` (utils.py)."""
    if frame.position is not None:
        return min(int(frame.position * num_frames), num_frames - 1)
    segment = (num_frames - 1) / frame.slots
    return int(segment / 2) + round(segment * frame.slot)


def _read_header(video: bytes, max_pixels: int) -> int:
    """Frames that the header promises (0 where it does not say), after a check of the picture size."""
    try:
        with av.open(io.BytesIO(video), mode="r") as container:
            stream = container.streams.video[0]
            size = (stream.codec_context.width, stream.codec_context.height)
            promised = stream.frames
    except Exception as error:  # hostile bytes make a foreign demuxer raise almost anything
        raise DecodeError("video does not open") from error
    if size[0] * size[1] > max_pixels:
        raise DecodeError("video too large")
    return promised


def _count_frames(video: bytes, promised: int) -> int:
    """Frames that are in the file, counted without decoding; at least as many as the header promises."""
    try:
        with av.open(io.BytesIO(video), mode="r") as container:
            count = sum(packet.size > 0 for packet in container.demux(video=0))
    except Exception as error:  # as in _read_header
        raise DecodeError("video does not open") from error
    if count < max(promised, 1):
        raise DecodeError("video has fewer frames than its header says")
    return count


def _read_with_decord(video: bytes, frames: Sequence[Frame], promised: int, image_size: int) -> list[np.ndarray] | None:
    """None when decord refuses. The reader must not cross a fork, so it lives in this call."""
    if decord is None:
        return None
    try:
        reader = decord.VideoReader(io.BytesIO(video), num_threads=1)
    except Exception:  # as in _read_header; PyAV has the last word
        return None
    try:
        if len(reader) != promised and len(reader) != _count_frames(video, promised):
            return None
        numbers = [frame_index(frame, len(reader)) for frame in frames]
        pixels = {}
        for number in sorted(set(numbers)):  # one at a time: together they may be gigabytes
            pixels[number] = resize_to_square(reader.get_batch([number]).asnumpy()[0], image_size)
        return [pixels[number] for number in numbers]
    except DecodeError:
        raise
    except Exception:  # as in _read_header; PyAV has the last word
        return None
    finally:
        del reader  # a traceback would keep it, and a fork that collects it waits for its threads for ever


def _read_with_av(video: bytes, frames: Sequence[Frame], promised: int, image_size: int) -> list[np.ndarray]:
    """Read from the start: right for any container."""
    num_frames = _count_frames(video, promised)
    numbers = [frame_index(frame, num_frames) for frame in frames]
    pixels = {}
    try:
        with av.open(io.BytesIO(video), mode="r") as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in numbers:
                    pixels[number] = resize_to_square(frame.to_ndarray(format="rgb24"), image_size)
                if number >= max(numbers):
                    return [pixels[number] for number in numbers]
    except Exception as error:  # as in _read_header
        raise DecodeError("video does not decode") from error
    raise DecodeError("video has fewer frames than its header says")
