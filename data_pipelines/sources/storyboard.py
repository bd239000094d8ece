"""Storyboards with subtitles: a window of thumbnails in time order, with what is said in between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.document import Document, Image, RawSample
from data_pipelines.headers import DecodeError, box_is_inside, header_size
from data_pipelines.sources.common import Limits, SampleError, check_at_least, join_texts
from data_pipelines.sources.storyboard_forms import Timeline, read_timeline


@dataclass
class StoryboardOptions:
    """Options of kind ``storyboard``.

    max_frames: thumbnails of a document: a contiguous window at random. The paper does not say how its sequences of
    some 100 frames were fitted into 2048 tokens; 8 is what it gives a video.
    """

    max_frames: int = 8

    def __post_init__(self) -> None:
        check_at_least("max_frames", self.max_frames, 1)


def read_storyboard(
    sample: RawSample, rng: np.random.Generator, options: StoryboardOptions, limits: Limits
) -> Document:
    timeline = read_timeline(sample)
    if not timeline.pictures:
        raise SampleError("no image")
    if not any(timeline.texts):
        raise SampleError("no subtitles")
    window = _choose_window(timeline, options.max_frames, rng)
    _check_pictures(window.pictures, limits)
    items: list[str | Image] = [window.texts[0]]
    for picture, text in zip(window.pictures, window.texts[1:], strict=True):
        items += [picture, text]
    return Document(join_texts(items, limits.max_text_characters))


def _choose_window(timeline: Timeline, max_frames: int, rng: np.random.Generator) -> Timeline:
    """At most max_frames neighbours and the text from the first one to the frame after the last; never without text."""
    size = min(max_frames, len(timeline.pictures))
    windows = [_cut_window(timeline, start, size) for start in range(len(timeline.pictures) - size + 1)]
    spoken = [window for window in windows if any(window.texts)]
    return spoken[rng.integers(len(spoken))]


def _cut_window(timeline: Timeline, start: int, size: int) -> Timeline:
    # What was said before the first frame belongs to the frame before it, unless there is none.
    first = timeline.texts[0] if start == 0 else ""
    texts = timeline.texts[start + 1 : start + size + 1]
    return Timeline(timeline.pictures[start : start + size], [first, *texts])


def _check_pictures(pictures: list[Image], limits: Limits) -> None:
    """One unusable thumbnail would mask the whole document at decode: better another sample in its place."""
    sizes = {id(picture.encoded): picture.encoded for picture in pictures}
    try:
        checked = {key: header_size(encoded, limits.max_pixels) for key, encoded in sizes.items()}
    except DecodeError as error:
        raise SampleError(error.reason) from error
    for picture in pictures:
        if picture.box and not box_is_inside(picture.box, checked[id(picture.encoded)]):
            raise SampleError("tile outside its sheet")
