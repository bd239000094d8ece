"""Frames of a clip whose pixels tell their number; both backends."""

from __future__ import annotations

import io
import multiprocessing

import av
import numpy as np
import PIL.Image
import pytest

from data_pipelines import video
from data_pipelines.document import Frame
from data_pipelines.headers import DecodeError, check_video
from data_pipelines.video import decode_frames, frame_index
from tests.data_pipelines.sources_helpers import clip, frame_number, picture

LIMIT = 10_000_000


@pytest.fixture(scope="module")
def clip_50() -> bytes:
    return clip(50)


def frames_at(encoded: bytes, numbers: list[int], num_frames: int) -> list[Frame]:
    return [Frame(encoded, 0, 1, (number + 0.5) / num_frames) for number in numbers]


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 9, 75, 250, 1001])
def test_segment_centres_are_those_of_emu(num_frames: int) -> None:
    segment = float(num_frames - 1) / 8
    expected = [int(segment / 2) + int(np.round(segment * slot)) for slot in range(8)]
    indices = [frame_index(Frame(b"", slot, 8), num_frames) for slot in range(8)]
    assert indices == expected
    assert min(indices) >= 0 and max(indices) < num_frames


def test_position_is_a_share_of_the_frames() -> None:
    assert [frame_index(Frame(b"", 0, 1, place), 10) for place in (0.0, 0.09, 0.1, 0.999)] == [0, 0, 1, 9]


@pytest.mark.parametrize("backend", ["decord", "av"])
def test_the_frames_asked_for_come_in_the_order_asked_for(
    clip_50: bytes, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "av":
        monkeypatch.setattr(video, "decord", None)
    numbers = [0, 49, 3, 3, 13, 12, 31]
    pixels = decode_frames(clip_50, frames_at(clip_50, numbers, 50), 32, LIMIT)
    assert [frame_number(frame) for frame in pixels] == numbers
    assert all(frame.shape == (3, 32, 32) and frame.dtype == np.uint8 for frame in pixels)


def test_backends_agree(clip_50: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    frames = [Frame(clip_50, slot, 8) for slot in range(8)]
    with_decord = decode_frames(clip_50, frames, 224, LIMIT)
    monkeypatch.setattr(video, "decord", None)
    np.testing.assert_array_equal(with_decord, decode_frames(clip_50, frames, 224, LIMIT))


def test_pyav_reads_what_decord_refuses(clip_50: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        class VideoReader:
            def __init__(self, *arguments: object, **options: object) -> None:
                raise RuntimeError("refused")

    monkeypatch.setattr(video, "decord", Refusing)
    assert frame_number(decode_frames(clip_50, frames_at(clip_50, [20], 50), 32, LIMIT)[0]) == 20


def test_frames_repeat_when_there_are_fewer_than_slots() -> None:
    encoded = clip(3)
    pixels = decode_frames(encoded, [Frame(encoded, slot, 8) for slot in range(8)], 32, LIMIT)
    assert [frame_number(frame) for frame in pixels] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_clip_cut_behind_its_header(clip_50: bytes) -> None:
    cut = clip_50[:-200]
    with pytest.raises(DecodeError) as caught:
        decode_frames(cut, frames_at(cut, [0], 50), 32, LIMIT)
    assert caught.value.reason == "video has fewer frames than its header says"


def test_bytes_that_are_no_video(clip_50: bytes) -> None:
    assert check_video(clip_50) is None
    for encoded in (b"", b"no longer available", picture(format="JPEG")):
        assert check_video(encoded) == "not a video"
    with pytest.raises(DecodeError, match="video does not open"):
        decode_frames(b"\0\0\0\x20ftypisom", [Frame(b"", 0, 1)], 32, LIMIT)


def test_frames_are_counted_where_the_header_does_not_say(clip_50: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matroska has no number of frames in its header."""
    encoded = remux(clip_50, "matroska")
    with av.open(io.BytesIO(encoded)) as container:
        assert container.streams.video[0].frames == 0
    for _ in ("decord", "av"):
        pixels = decode_frames(encoded, frames_at(encoded, [0, 20, 49], 50), 32, LIMIT)
        assert [frame_number(frame) for frame in pixels] == [0, 20, 49]
        monkeypatch.setattr(video, "decord", None)


def remux(encoded: bytes, format: str) -> bytes:
    out = io.BytesIO()
    with av.open(io.BytesIO(encoded)) as source, av.open(out, "w", format=format) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


def test_resize_is_pillows(clip_50: bytes) -> None:
    decord = pytest.importorskip("decord")
    reader = decord.VideoReader(io.BytesIO(clip_50))
    expected = [
        PIL.Image.fromarray(reader[k].asnumpy()).resize((24, 24), PIL.Image.Resampling.BICUBIC) for k in (5, 30)
    ]
    pixels = decode_frames(clip_50, frames_at(clip_50, [5, 30], 50), 24, LIMIT)
    for ours, pillows in zip(pixels, expected, strict=True):
        assert np.abs(ours.astype(int) - np.asarray(pillows).transpose(2, 0, 1)).max() <= 1


def test_size_limit(clip_50: bytes) -> None:
    with pytest.raises(DecodeError, match="video too large"):
        decode_frames(clip_50, [Frame(clip_50, 0, 1)], 32, 64 * 64 - 1)


def decode_in_child(encoded: bytes) -> int:
    return frame_number(decode_frames(encoded, frames_at(encoded, [20], 50), 32, LIMIT)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_worker_decodes_after_its_parent(clip_50: bytes) -> None:
    assert decode_in_child(clip_50) == 20
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(decode_in_child, [clip_50]).get(timeout=30) == 20
