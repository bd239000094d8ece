"""Shards written by other people's tools, read sample by sample down to pixels.

The counts were checked against the tars with separate scripts that read the json members alone.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from data_pipelines.document import Document, Image, RawSample, Skip
from data_pipelines.headers import DecodeError
from data_pipelines.images import decode_image
from data_pipelines.pictures import decode_pictures
from data_pipelines.sources import Source
from data_pipelines.sources.storyboard_forms import read_timeline
from tests.data_pipelines.sources_helpers import pictures, read_samples, rng, source, texts

SIZE, MAX_PIXELS = 32, 64_000_000


def outcome(read: Source, raw: RawSample, seed: int) -> tuple[str, int]:
    """ "document" or why there is none, and the number of pictures."""
    result = read(raw, rng(seed))
    if isinstance(result, Skip):
        return result.reason, 0
    decoded = decode_pictures(pictures(result), SIZE, MAX_PIXELS)
    errors = [pixels.reason for pixels in decoded if isinstance(pixels, DecodeError)]
    assert all(isinstance(pixels, DecodeError) or pixels.shape == (3, SIZE, SIZE) for pixels in decoded)
    return (errors[0] if errors else "document"), len(decoded)


def count(shard: Path, kind: str, **options: Any) -> dict[str, int]:
    read = source(kind, **options)
    counts: Counter[str] = Counter()
    for seed, raw in enumerate(read_samples(shard)):
        reason, num_pictures = outcome(read, raw, seed)
        counts[reason] += 1
        counts["pictures"] += num_pictures
    return dict(counts)


@pytest.mark.parametrize(
    ("shard", "kind", "options", "expected"),
    [
        ("laion/00000.tar", "laion", {}, {"document": 110, "pictures": 110}),
        ("laion/00001.tar", "laion", {}, {"document": 110, "pictures": 110}),
        ("laion/00002.tar", "laion", {}, {"document": 110, "pictures": 110}),
        ("laion/cc12m-train-0000.tar", "pairs", {}, {"document": 32, "pictures": 32}),
        ("laion/00000.tar", "laion", {"min_similarity": 0.3}, {"filtered: no similarity": 110, "pictures": 0}),
        ("laion_coco/00000.tar", "laion", {}, {"document": 71, "empty caption": 1, "pictures": 71}),
        ("laion_coco/00000.tar", "laion", {"caption": "json:top_caption"}, {"document": 72, "pictures": 72}),
        ("laion_coco/00000.tar", "laion", {"caption": "json:all_captions"}, {"document": 72, "pictures": 72}),
        ("laion_coco/00000.tar", "text", {"text": "json:top_caption"}, {"document": 72, "pictures": 0}),
        ("webvid/00000.tar", "webvid", {}, {"document": 16, "no video": 2, "pictures": 128}),
        ("webvid/return_all_test.tar", "webvid", {}, {"document": 3, "not a video": 3, "pictures": 24}),
        ("yt_storyboard/0000000.tar", "storyboard", {}, {"document": 3, "pictures": 24}),
        ("yt_storyboard/yt_sb-000000.tar", "storyboard", {}, {"document": 4, "pictures": 32}),
    ],
)
def test_counts(real_data: Path, shard: str, kind: str, options: dict[str, Any], expected: dict[str, int]) -> None:
    assert count(real_data / shard, kind, **options) == expected


NO_MATCH = "no picture above the similarity threshold"


@pytest.mark.parametrize("shard", ["mmc4/000000000.tar", "mmc4/lean-000000.tar"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"document": 48, NO_MATCH: 5, "pictures": 98}),
        ({"similarity_threshold": 0.24}, {"document": 51, NO_MATCH: 2, "pictures": 112}),
        ({"min_image_kb": 11}, {"document": 23, "image file too small": 25, NO_MATCH: 5, "pictures": 33}),
        ({"drop_url_duplicates": True}, {"document": 46, "filtered: url duplicate": 2, NO_MATCH: 5, "pictures": 95}),
    ],
)
def test_mmc4_counts(real_data: Path, shard: str, options: dict[str, Any], expected: dict[str, int]) -> None:
    """Every page here has fewer than six pictures and 1024 tokens, so no sequence leaves any out."""
    assert count(real_data / shard, "mmc4", **options) == expected


def test_both_mmc4_forms_give_the_same_documents(real_data: Path) -> None:
    read = source("mmc4")
    forms = [
        {raw.name: read(raw, rng(3)) for raw in read_samples(real_data / "mmc4" / name)}
        for name in ("000000000.tar", "lean-000000.tar")
    ]
    assert forms[0] == forms[1] and len(forms[0]) == 53


def test_mmc4_pictures_stand_at_the_sentence_that_the_page_names(real_data: Path) -> None:
    read = source("mmc4", matched_probability=0.0, image_first_probability=1.0)
    for raw in read_samples(real_data / "mmc4" / "lean-000000.tar"):
        page = json.loads(raw.members["json"])
        result = read(raw, rng())
        if isinstance(result, Skip):
            continue
        infos = enumerate(page["image_info"])
        sentence_of = {
            raw.members[f"{n}.jpg"]: info["matched_text_index"] for n, info in infos if f"{n}.jpg" in raw.members
        }
        for element, following in zip(result.elements, result.elements[1:], strict=False):
            if isinstance(element, Image) and not isinstance(following, Image):
                assert following.text.startswith(page["text_list"][sentence_of[element.encoded]].strip())  # type: ignore[union-attr]


def test_raw_and_split_storyboards_are_the_same_timeline(real_data: Path) -> None:
    """Emu's maker cut the same sheets into frames and merged the same subtitles."""
    folder = real_data / "yt_storyboard"
    raw = {sample.name: read_timeline(sample) for sample in read_samples(folder / "yt_sb-000000.tar")}
    split = {sample.name: read_timeline(sample) for sample in read_samples(folder / "0000000.tar")}
    assert {name: len(timeline.pictures) for name, timeline in raw.items()} == {
        **{"GnomeDispl1": 38, "StreetBikes": 11, "SkvideoReel": 10, "WhWc3b3KhnY": 94},
    }
    assert len(split) == 3
    for name, timeline in split.items():
        assert timeline.texts == raw[name].texts
        for whole, cut in zip(timeline.pictures, raw[name].pictures, strict=True):
            np.testing.assert_array_equal(decode_image(whole, SIZE, MAX_PIXELS), decode_image(cut, SIZE, MAX_PIXELS))


CORRUPT = {
    "duplicate_member.tar": {"000000001": "duplicate member"},
    "jpg_cmyk.tar": {},
    "jpg_empty.tar": {"000000001": "not an image"},
    "jpg_exif_rotated.tar": {},
    "jpg_half.tar": {"000000001": "image does not decode"},
    "jpg_is_animated_gif.tar": {},
    "jpg_is_html.tar": {"000000001": "not an image"},
    "json_nan.tar": {},
    "json_not_json.tar": {"000000001": "json does not parse"},
    "missing_member.tar": {"000000001": "no image"},
    "mp4_is_text.tar": {"000000001": "not a video"},
    "mp4_truncated.tar": {
        "000000001": "video does not open",
        "000000002": "video has fewer frames than its header says",
    },
    "path_traversal.tar": {"../../etc/evil2": "no caption"},
    "pickle_member.tar": {},
    "png_bomb.tar": {"000000001": "image too large"},
    "png_modes.tar": {},
    "symlink_member.tar": {"000000001": "no image"},
    "truncated_tar.tar": {},
    "txt_1mb.tar": {"000000001": "caption too long"},
    "txt_bad_utf8.tar": {"000000001": "caption is not utf-8"},
    "txt_empty.tar": {"000000001": "empty caption", "000000002": "empty caption"},
}


def corrupt_outcomes(shard: Path) -> dict[str, str]:
    read = source("webvid" if shard.name.startswith("mp4") else "laion")
    return {raw.name: outcome(read, raw, seed)[0] for seed, raw in enumerate(read_samples(shard))}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_shards(real_data: Path, name: str) -> None:
    expected = json.loads((real_data / "corrupt" / "expected.json").read_text())[name]
    found = corrupt_outcomes(real_data / "corrupt" / name)
    bad = {key: reason for key, reason in found.items() if reason != "document"}
    assert bad == CORRUPT[name]
    assert all(
        found.get(key) == "document"
        for key in [*expected["good_keys"], *expected.get("odd_keys", {})]
        if key not in bad
    )
    assert all(found.get(key) != "document" for key in expected.get("bad_keys", {}))


def test_every_corrupt_shard_is_tried(real_data: Path) -> None:
    assert set(CORRUPT) == {path.name for path in (real_data / "corrupt").glob("*.tar")}


def corrupt_documents(real_data: Path, name: str) -> dict[str, Document]:
    read = source("pairs")
    results = {raw.name: read(raw, rng()) for raw in read_samples(real_data / "corrupt" / name)}
    return {key: result for key, result in results.items() if isinstance(result, Document)}


def pixels_of(result: Document, size: int = 64) -> np.ndarray:
    return decode_image(pictures(result)[0], size, MAX_PIXELS).astype(int)  # type: ignore[arg-type]


def test_names_that_climb_are_keys_and_never_paths(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert set(corrupt_documents(real_data, "path_traversal.tar")) == {"000000000", "../evil", "000000002"}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_pickle_members_do_not_matter(real_data: Path) -> None:
    found = corrupt_documents(real_data, "pickle_member.tar")
    assert len(found) == 4 and all(texts(result) for result in found.values())


def test_all_modes_of_one_picture_look_alike(real_data: Path) -> None:
    """1, L, I;16, LA, RGBA, P of one motif: gray values agree, and 16 bits are not all white."""
    found = corrupt_documents(real_data, "png_modes.tar")
    bilevel, gray, deep, gray_alpha, color, palette = (pixels_of(found[f"00000000{number}"]) for number in range(1, 7))
    assert np.abs(gray - deep).max() <= 1
    assert 100 < deep.mean() < 200
    assert abs(bilevel.mean() - gray.mean()) < 5
    assert np.abs(color - palette).mean() < 16  # 256 colours only
    for number, transparent in (("000000004", gray_alpha), ("000000005", color)):
        encoded = pictures(found[number])[0].encoded  # type: ignore[union-attr]
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            white = PIL.Image.new("RGBA", image.size, "white")
            expected = PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB").resize((64, 64), 3)
        assert np.abs(transparent - np.asarray(expected).transpose(2, 0, 1)).max() <= 1


def test_cmyk_and_gif_show_the_motif_of_the_gray_file(real_data: Path) -> None:
    """All were made from one photograph; inverted or all-white colours would be off by about 100."""
    gray = pixels_of(corrupt_documents(real_data, "png_modes.tar")["000000002"])[0]
    for name in ("jpg_cmyk.tar", "jpg_is_animated_gif.tar"):
        red, green, blue = pixels_of(corrupt_documents(real_data, name)["000000001"])
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        assert np.abs(luma - gray).mean() < 8


def test_exif_rotation_is_applied(real_data: Path) -> None:
    result = corrupt_documents(real_data, "jpg_exif_rotated.tar")["000000001"]
    encoded = pictures(result)[0].encoded  # type: ignore[union-attr]
    with PIL.Image.open(io.BytesIO(encoded)) as stored:
        assert stored.size == (160, 107)
        expected = stored.convert("RGB").rotate(-90, expand=True)  # orientation 6: turn it clockwise to see it upright
    assert expected.size == (107, 160)
    expected_pixels = np.asarray(expected.resize((64, 64), PIL.Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(pixels_of(result) - expected_pixels).max() <= 2
