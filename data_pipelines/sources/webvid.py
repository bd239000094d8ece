"""Captioned video as video2dataset writes it: <key>.mp4, <key>.txt, <key>.json. Failed downloads lack the video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.document import Document, Frame, RawSample
from data_pipelines.headers import check_video
from data_pipelines.sources.common import (
    Limits,
    SampleError,
    check_at_least,
    check_choice,
    check_field,
    check_probability,
    find_member,
    parse_json,
    read_caption,
    with_caption,
)

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")


@dataclass
class WebvidOptions:
    """Options of kind ``webvid``.

    caption: txt | json:<name>. num_frames: 8 as in the paper.
    frame_choice: random (the paper's pretraining) | centre (of num_frames equal segments, as Emu's released inference).
    image_first_probability: the frames stand before the caption so often, else after it; the paper says so of pictures,
    one half is assumed.
    """

    caption: str = "txt"
    num_frames: int = 8
    frame_choice: str = "random"
    image_first_probability: float = 0.5

    def __post_init__(self) -> None:
        check_field("caption", self.caption)
        check_at_least("num_frames", self.num_frames, 1)
        check_choice("frame_choice", self.frame_choice, ("random", "centre"))
        check_probability("image_first_probability", self.image_first_probability)


def read_webvid(sample: RawSample, rng: np.random.Generator, options: WebvidOptions, limits: Limits) -> Document:
    """The frames of one clip in time order, and its caption."""
    video = find_member(sample, VIDEO_EXTENSIONS, missing="no video")
    caption = read_caption(sample, parse_json(sample), options.caption, rng, limits)
    reason = check_video(video)
    if reason:
        raise SampleError(reason)
    frames = _choose_frames(video, rng, options)
    return with_caption(frames, caption, options.image_first_probability, rng)


def _choose_frames(video: bytes, rng: np.random.Generator, options: WebvidOptions) -> list[Frame]:
    slots = options.num_frames
    positions: list[float | None] = [None] * slots
    if options.frame_choice == "random":
        positions = sorted(rng.random(slots).tolist())
    return [Frame(video, slot, slots, position) for slot, position in enumerate(positions)]
