"""Storyboards: three stored forms, times, windows, subtitles."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest

from data_pipelines.config import DataConfig
from data_pipelines.document import Image, RawSample, Skip, Text
from data_pipelines.images import decode_image
from data_pipelines.sources.common import clean_subtitle
from data_pipelines.sources.storyboard_forms import frame_interval
from tests.data_pipelines.sources_helpers import document, encode, picture, rng, sample, shape, source, texts, to_bytes

TILE = (16, 12)


def sheet(numbers: range, columns: int) -> bytes:
    """Tile of frame n is gray 4 n; the last row is cropped as YouTube does."""
    rows = -(-len(numbers) // columns)
    image = PIL.Image.new("L", (min(columns, len(numbers)) * TILE[0], rows * TILE[1]))
    for place, number in enumerate(numbers):
        row, column = divmod(place, columns)
        image.paste(4 * number, (column * TILE[0], row * TILE[1], (column + 1) * TILE[0], (row + 1) * TILE[1]))
    return encode(image)


def lines(*spoken: tuple[float, str]) -> list[dict[str, Any]]:
    return [{"start": start, "duration": 1.0, "text": text} for start, text in spoken]


def raw_form(
    num_frames: int, subtitles: list[dict[str, Any]], missing: tuple[int, ...] = (), **board: Any
) -> RawSample:
    """Sheets of 3 x 2 tiles, a frame every 2 seconds."""
    parts = [range(first, min(first + 6, num_frames)) for first in range(0, num_frames, 6)]
    grids = [{"columns": min(3, len(part)), "rows": -(-len(part) // 3), "count": len(part)} for part in parts]
    story = {"tile_width": TILE[0], "tile_height": TILE[1], "interval": 2.0, "sheets": grids, **board}
    members = {f"sb_{n}__webp": sheet(part, 3) for n, part in enumerate(parts) if n not in missing}
    return sample(json={"storyboard": story, "duration": 2.0 * num_frames, "subtitles": subtitles}, **members)


def read(raw: RawSample, seed: int = 0, **options: Any) -> list[str | int]:
    """Elements in order: texts, and frames by number, told by their pixels."""
    elements = document(source("storyboard", **options)(raw, rng(seed))).elements
    assert all(isinstance(element, (Text, Image)) for element in elements)
    return [
        round(float(decode_image(element, 8, 10**6).mean()) / 4) if isinstance(element, Image) else element.text  # type: ignore[union-attr]
        for element in elements
    ]


def reason(raw: RawSample, limits: DataConfig | None = None) -> str:
    result = source("storyboard", limits)(raw, rng())
    assert isinstance(result, Skip), result
    return result.reason


def test_raw_form_tiles_and_times() -> None:
    """Frame n is shown at 2 n seconds; a line that starts with a frame follows it; the last line is the tail."""
    subtitles = lines((0.0, "a"), (1.9, "b"), (4.0, "c"), (3.9, "before c"), (100.0, "tail"))
    assert read(raw_form(8, subtitles)) == [0, "a b", 1, "before c", 2, "c", 3, 4, 5, 6, 7, "tail"]


def test_cropped_last_sheet_and_text_before_the_first_frame() -> None:
    assert read(raw_form(7, lines((-1.0, "title"))), max_frames=7) == ["title", 0, 1, 2, 3, 4, 5, 6]
    assert read(raw_form(8, lines((15.0, "end")))) == [0, 1, 2, 3, 4, 5, 6, 7, "end"]


def test_a_missing_sheet_is_a_gap_and_shifts_no_time() -> None:
    subtitles = lines((1.0, "early"), (13.0, "in the gap"), (25.0, "late"))
    assert read(raw_form(14, subtitles, missing=(1,)), max_frames=20) == [
        *(0, "early", 1, 2, 3, 4, 5, "in the gap", 12, "late", 13),
    ]


@pytest.mark.parametrize("interval", [None, 0, -1.0])
def test_unknown_interval_is_the_rounded_share_of_the_duration(interval: float | None) -> None:
    """Emu's rule: round(duration / number of frames) = 2 seconds here."""
    assert read(raw_form(3, lines((2.5, "x")), interval=interval)) == [0, 1, "x", 2]
    broken = raw_form(3, lines((2.5, "x")), interval=interval)
    no_duration = RawSample(
        "0", {**broken.members, "json": broken.members["json"].replace(b'"duration": 6.0', b'"a": 1')}
    )
    assert reason(no_duration) == "no duration"


@pytest.mark.parametrize(
    ("duration", "num_frames", "seconds"),
    [(12.0, 4, 3), (100.0, 9, 11), (26.0, 10, 3), (1.0, 1, 1), (2.0, 5, 0.4), (2.0, 4, 0.5)],
)
def test_frames_share_the_duration(duration: float, num_frames: int, seconds: float) -> None:
    """In whole seconds, exactly where that would be none."""
    assert frame_interval(duration, num_frames) == seconds


def test_emu_sheets() -> None:
    """final_meta.json holds the size of the whole sheet: the tile is its share; the interval is round(14 / 8) = 2."""
    meta = {"sb": {"0": [48, 24, 3, 2, 6, "webp"], "1": [32, 12, 2, 1, 2, "webp"]}, "duration": 14}
    members = {"sb_0__webp": sheet(range(6), 3), "sb_1__webp": sheet(range(6, 8), 3)}
    raw = sample(final_meta__json={**meta, "subtitle": lines((1.0, "a"), (13.0, "b"))}, **members)
    assert read(raw) == [0, "a", 1, 2, 3, 4, 5, 6, "b", 7]


def test_emu_sheets_are_in_numeric_order() -> None:
    """Sheet 10 holds two frames, the others one: as text, its number comes third."""
    grids = {str(number): [16, 12, 1, 1, 1, "webp"] for number in range(12)} | {"10": [32, 12, 2, 1, 2, "webp"]}
    meta = {"sb": dict(sorted(grids.items())), "duration": 26, "subtitle": lines((100.0, "x"))}
    members = {f"sb_{number}__webp": sheet(range(number, number + 1), 1) for number in range(10)}
    members |= {"sb_10__webp": sheet(range(10, 12), 2), "sb_11__webp": sheet(range(12, 13), 1)}
    raw = sample(final_meta__json=meta, **members)
    assert read(raw, max_frames=13) == [*range(13), "x"]


def test_split_form_is_in_numeric_order() -> None:
    members: dict[str, Any] = {f"{n}__png": picture((4 * n, 4 * n, 4 * n)) for n in range(12)}
    members |= {f"{n}__txt": f"before {n}" if n in (2, 10) else "" for n in range(12)} | {"12__txt": "tail"}
    in_tar_order = sample(final_meta__json={"id": "x"}, **dict(sorted(members.items())))
    expected = [0, 1, "before 2", *range(2, 10), "before 10", 10, 11, "tail"]
    assert read(in_tar_order, max_frames=12) == expected
    without_frame_10 = {name: data for name, data in in_tar_order.members.items() if name != "10.png"}
    expected.remove(10)
    assert read(RawSample("0", without_frame_10), max_frames=12) == expected


@pytest.mark.parametrize("form", ["vtt", "srt", "json3"])
def test_subtitles_in_a_member_of_their_own(form: str) -> None:
    events = {"events": [{"tStartMs": 2500, "dDurationMs": 10, "segs": [{"utf8": "x"}]}]}
    spoken = {"json3": events, "vtt": "WEBVTT\n\n00:02.500 --> 00:03.000\nx\n"}
    spoken["srt"] = "1\r\n00:00:02,500 --> 00:00:03,000\r\nx\r\n"
    raw = raw_form(3, [])
    assert read(RawSample("0", {**raw.members, form: to_bytes(spoken[form])})) == [0, 1, "x", 2]
    assert reason(RawSample("0", {**raw.members, form: b"{"})) in ("malformed sample", "no subtitles")
    in_json = raw_form(3, lines((0.5, "json")))
    assert read(RawSample("0", {**in_json.members, form: to_bytes(spoken[form])})) == [0, "json", 1, 2]


@pytest.mark.slow
def test_windows_are_contiguous_and_never_silent() -> None:
    raw = raw_form(60, lines(*[(2.0 * n + 1, f"after {n}") for n in (3, 30, 57)]))
    starts = set()
    for seed in range(300):
        elements = read(raw, seed)
        frames = [element for element in elements if isinstance(element, int)]
        assert frames == list(range(frames[0], frames[0] + 8))
        spoken = [n for n in (3, 30, 57) if n in frames]
        assert [element for element in elements if isinstance(element, str)] == [f"after {n}" for n in spoken]
        assert spoken
        starts.add(frames[0])
    assert min(starts) == 0 and max(starts) == 52
    assert starts == {*range(4), *range(23, 31), *range(50, 53)}


def test_a_window_as_long_as_asked_for() -> None:
    raw = raw_form(12, lines((1.0, "x")))
    assert shape(source("storyboard", max_frames=3)(raw, rng())) == "itii"
    assert document(source("storyboard")(raw, rng())).max_tokens is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Music]", ""),
        ("hello\nworld [Applause]  again", "hello world again"),
        ("&quot;Tom &amp; Jerry&#39;s&quot;", '"Tom & Jerry\'s"'),
        ("♪ la la ♪", "la la"),
        ("[[[", "[[["),
    ],
)
def test_subtitle_cleaning(text: str, expected: str) -> None:
    assert clean_subtitle(text) == expected


def test_skips() -> None:
    spoken = lines((1.0, "x"))
    assert reason(raw_form(4, [])) == "no subtitles"
    assert reason(raw_form(4, lines((1.0, "[Music]")))) == "no subtitles"
    assert reason(raw_form(4, spoken, missing=(0,))) == "no image"
    assert reason(sample(sb_0__webp=picture())) == "no json"
    assert reason(sample(json={"storyboard": None}, sb_0__webp=picture())) == "malformed sample"
    assert reason(raw_form(4, spoken, tile_width=17)) == "tile outside its sheet"
    assert reason(raw_form(4, spoken, tile_width=-1)) == "tile outside its sheet"
    assert reason(raw_form(4, spoken), DataConfig(max_image_megapixels=1e-6)) == "image too large"
    broken = raw_form(4, spoken)
    assert reason(RawSample("0", {**broken.members, "sb_0.webp": b"<html>"})) == "not an image"


def test_counts_beyond_the_grid_are_cut() -> None:
    grid = [{"columns": 3, "rows": 1, "count": 10**12}]
    assert read(raw_form(3, lines((1.0, "x")), sheets=grid)) == [0, "x", 1, 2]


def test_text_limit() -> None:
    result = source("storyboard", DataConfig(max_text_characters=4))(raw_form(3, lines((1.0, "x" * 9))), rng())
    assert texts(result) == ["xxxx"]


def test_windows_share_the_bytes_of_their_sheet() -> None:
    result = document(source("storyboard")(raw_form(6, lines((1.0, "x"))), rng()))
    assert len({id(element.encoded) for element in result.elements if isinstance(element, Image)}) == 1
