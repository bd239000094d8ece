"""Pairs and LAION: captions, filters, defects."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data_pipelines.config import DataConfig
from data_pipelines.document import RawSample, Skip
from tests.data_pipelines.sources_helpers import document, picture, rng, sample, shape, source, texts

PNG = picture()


def caption_of(kind: str, raw: RawSample, seed: int = 0, **options: Any) -> str:
    return texts(source(kind, **options)(raw, rng(seed)))[0]


def reason(kind: str, raw: RawSample, limits: DataConfig | None = None, **options: Any) -> str:
    result = source(kind, limits, **options)(raw, rng())
    assert isinstance(result, Skip), result
    return result.reason


def test_image_stands_before_its_caption_half_of_the_time() -> None:
    read = source("pairs")
    shapes = [shape(read(sample(jpg=PNG, txt="a dog"), rng(seed))) for seed in range(1000)]
    assert set(shapes) == {"it", "ti"}
    assert 450 < shapes.count("it") < 550  # within 3.2 standard deviations of 500


@pytest.mark.parametrize(("probability", "expected"), [(0.0, "ti"), (1.0, "it")])
def test_image_first_probability(probability: float, expected: str) -> None:
    for kind in ("pairs", "laion"):
        read = source(kind, image_first_probability=probability)
        assert {shape(read(sample(jpg=PNG, txt="a dog"), rng(seed))) for seed in range(20)} == {expected}


def test_a_sample_is_a_function_of_its_generator() -> None:
    raw = sample(jpg=PNG, json={"all_captions": ["a", "b", "c"]})
    read = source("laion", caption="json:all_captions")
    assert [read(raw, rng(seed)) for seed in range(20)] == [read(raw, rng(seed)) for seed in range(20)]


def test_caption_fields() -> None:
    coco = sample(jpg=PNG, txt=" IMG_0042 \n", json={"caption": "IMG_0042", "top_caption": "a dog", "all_captions": []})
    assert caption_of("laion", coco) == "IMG_0042"
    assert caption_of("laion", coco, caption="json:top_caption") == "a dog"
    assert reason("laion", coco, caption="json:all_captions") == "no caption"
    assert reason("laion", coco, caption="json:missing") == "no caption"
    several = sample(jpg=PNG, json={"all_captions": ["a dog", "", None, "a cat"]})
    assert {caption_of("laion", several, seed, caption="json:all_captions") for seed in range(20)} == {"a dog", "a cat"}


def test_txt_falls_back_to_the_caption_in_json() -> None:
    assert caption_of("pairs", sample(jpg=PNG, json={"caption": "a dog"})) == "a dog"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": "a"}, "no image"),
        ({"jpg": PNG}, "no caption"),
        ({"jpg": PNG, "json": {"caption": None}}, "no caption"),
        ({"jpg": PNG, "json": {"caption": 3}}, "malformed sample"),
        ({"jpg": PNG, "txt": " \n\t"}, "empty caption"),
        ({"jpg": PNG, "txt": "", "json": {"caption": "unused"}}, "empty caption"),
        ({"jpg": PNG, "txt": b"\xff\xfe"}, "caption is not utf-8"),
        ({"jpg": PNG, "txt": "a" * 100_001}, "caption too long"),
        ({"jpg": PNG, "txt": "a", "json": b"{"}, "json does not parse"),
        ({"jpg": PNG, "txt": "a", "json": b"[" * 100_000}, "json does not parse"),
        ({"jpg": PNG, "txt": "a", "json": b"\xff{}"}, "json does not parse"),
        ({"jpg": PNG, "txt": "a", "json": [1]}, "json is not an object"),
        ({"jpg": b"<html>", "txt": "a"}, "not an image"),
        ({"jpg": b"", "txt": "a"}, "not an image"),
    ],
)
def test_skips(members: dict[str, Any], expected: str) -> None:
    assert reason("pairs", sample(**members)) == expected
    assert reason("laion", sample(**members)) == expected


def test_limits_of_the_pipeline_hold() -> None:
    large = sample(jpg=picture(size=(1001, 1000)), txt="a dog")
    assert reason("pairs", large, DataConfig(max_image_megapixels=1.0)) == "image too large"
    assert reason("pairs", sample(jpg=PNG, txt="abc"), DataConfig(max_text_characters=2)) == "caption too long"
    assert reason("pairs", sample(jpg=PNG, txt="abc"), min_image_side=9) == "image too small"


def test_a_defect_of_the_archive_is_the_reason() -> None:
    assert reason("pairs", RawSample("0", {"jpg": PNG, "txt": b"a"}, "duplicate member")) == "duplicate member"


def test_members_of_other_kinds_are_never_read() -> None:
    assert texts(source("pairs")(sample(jpg=PNG, txt="a", pkl=b"\x80\x04 evil", pyd=b"evil"), rng())) == ["a"]


def test_lone_surrogates_do_not_reach_the_tokenizer() -> None:
    raw = sample(jpg=PNG, json=rb'{"caption": "a \ud800dog"}')
    assert caption_of("pairs", raw) == "a dog"


@pytest.mark.parametrize(
    ("options", "passes", "fails"),
    [
        ({"min_similarity": 0.3}, {"similarity": 0.3}, {"similarity": 0.29}),
        ({"max_punsafe": 0.5}, {"punsafe": 0.5}, {"punsafe": 0.51}),
        ({"max_pwatermark": 0.8}, {"pwatermark": 0}, {"pwatermark": 1}),
        ({"drop_nsfw": ["NSFW", "unsure"]}, {"NSFW": "UNLIKELY"}, {"NSFW": "Unsure"}),
    ],
)
def test_filters(options: dict[str, Any], passes: dict[str, Any], fails: dict[str, Any]) -> None:
    field = next(iter(passes))
    document(source("laion", **options)(sample(jpg=PNG, txt="a", json=passes), rng()))
    document(source("laion")(sample(jpg=PNG, txt="a", json=fails), rng()))
    assert reason("laion", sample(jpg=PNG, txt="a", json=fails), **options) == f"filtered: {field}"
    for unknown in ({}, {field: None}, {field: float("nan")}, {field: [1]}):
        raw = sample(jpg=PNG, txt="a", json=json.dumps(unknown))
        assert reason("laion", raw, **options) == f"filtered: no {field}"
        document(source("laion", missing_fields="keep", **options)(raw, rng()))
