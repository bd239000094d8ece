"""Captioned clips: frames, captions, failed downloads."""

from __future__ import annotations

import pytest

from data_pipelines.document import Frame, Skip
from tests.data_pipelines.sources_helpers import clip, document, picture, pictures, rng, sample, shape, source, texts

MP4 = clip(2)


def frames_of(seed: int = 0, **options: object) -> list[Frame]:
    found = pictures(source("webvid", **options)(sample(mp4=MP4, txt="a van"), rng(seed)))
    return [frame for frame in found if isinstance(frame, Frame)]


def test_eight_random_frames_in_time_order() -> None:
    frames = frames_of()
    positions = [frame.position for frame in frames if frame.position is not None]
    assert [(frame.slot, frame.slots) for frame in frames] == [(slot, 8) for slot in range(8)]
    assert len(set(positions)) == 8 and positions == sorted(positions)
    assert positions[0] >= 0 and positions[-1] < 1
    assert positions != [frame.position for frame in frames_of(seed=1)]


def test_positions_are_uniform() -> None:
    positions = [frame.position or 0.0 for seed in range(500) for frame in frames_of(seed)]
    tenths = [sum(tenth <= 10 * position < tenth + 1 for position in positions) for tenth in range(10)]
    assert all(300 < count < 500 for count in tenths)  # 4000 in all: 400 each, standard deviation 19


def test_segment_centres() -> None:
    assert [frame.position for frame in frames_of(frame_choice="centre", num_frames=4)] == [None] * 4


def test_the_frames_share_the_bytes() -> None:
    assert all(frame.video is frames_of()[0].video for frame in frames_of())


def test_frames_before_or_after_the_caption() -> None:
    read = source("webvid", num_frames=2)
    shapes = [shape(read(sample(mp4=MP4, txt="a van"), rng(seed))) for seed in range(1000)]
    assert set(shapes) == {"fft", "tff"} and 450 < shapes.count("fft") < 550


def test_captions() -> None:
    raw = sample(mp4=MP4, json={"caption": "a van", "title": "traffic"})
    assert texts(source("webvid")(raw, rng())) == ["a van"]
    assert texts(source("webvid", caption="json:title")(raw, rng())) == ["traffic"]
    assert document(source("webvid")(raw, rng())).max_tokens is None


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": "a van", "json": {"status": "failed_to_download"}}, "no video"),
        ({"mp4": MP4}, "no caption"),
        ({"mp4": MP4, "txt": " "}, "empty caption"),
        ({"mp4": MP4, "txt": "a van", "json": b"{"}, "json does not parse"),
        ({"mp4": b"This video is no longer available.", "txt": "a van"}, "not a video"),
        ({"mp4": picture(format="JPEG"), "txt": "a van"}, "not a video"),
        ({"mp4": b"", "txt": "a van"}, "not a video"),
    ],
)
def test_skips(members: dict[str, object], expected: str) -> None:
    assert source("webvid")(sample(**members), rng()) == Skip(expected)
