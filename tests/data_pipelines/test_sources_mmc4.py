"""MMC4 pages: both stored forms, which pictures are kept, where they stand, which part of a page is read."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from data_pipelines.config import DataConfig
from data_pipelines.document import Image, RawSample, Skip, Text
from tests.data_pipelines.sources_helpers import document, picture, pictures, rng, sample, shape, source, texts

WHOLE = {"matched_probability": 0.0, "image_first_probability": 1.0}


def png(number: int) -> bytes:
    return picture((number, 0, 0))


def page(sentences: list[str], matches: list[tuple[int, float]], lean: bool = False, **extra: Any) -> RawSample:
    """matches: (sentence, similarity) of picture 0, 1, ... in the order of image_info."""
    infos: list[dict[str, Any]] = [
        {"image_name": f"{number}.jpg", "matched_text_index": sentence, "matched_sim": similarity}
        for number, (sentence, similarity) in enumerate(matches)
    ]
    members: dict[str, Any] = {}
    for number, info in enumerate(infos):
        if lean:
            members[f"{number}__jpg"] = png(number)
        else:
            info["image_base64"] = base64.b64encode(png(number)).decode()
    return sample(json={"text_list": sentences, "image_info": infos, **extra}, **members)


def read(raw: RawSample, seed: int = 0, **options: Any) -> list[str | int]:
    """Elements in order: texts, and pictures by number."""
    elements = document(source("mmc4", **options)(raw, rng(seed))).elements
    numbers = {png(number): number for number in range(20)}
    return [element.text if isinstance(element, Text) else numbers[element.encoded] for element in elements]  # type: ignore[union-attr]


def reason(raw: RawSample, limits: DataConfig | None = None, **options: Any) -> str:
    result = source("mmc4", limits, **options)(raw, rng())
    assert isinstance(result, Skip), result
    return result.reason


@pytest.mark.parametrize("lean", [False, True])
def test_pictures_stand_at_their_sentences_whatever_their_order(lean: bool) -> None:
    """The known bug keeps pictures in the order of image_info while places are in the order of sentences."""
    raw = page(["zero", "one", "two", "three"], [(3, 0.4), (0, 0.4), (2, 0.4)], lean)
    assert read(raw, **WHOLE) == [1, "zero one", 2, "two", 0, "three"]
    assert read(raw, matched_probability=0.0, image_first_probability=0.0) == ["zero", 1, "one two", 2, "three", 0]


def test_before_or_after_is_drawn_for_each_picture() -> None:
    raw = page(["zero", "one"], [(0, 0.4), (1, 0.4)])
    assert {shape(source("mmc4", matched_probability=0.0)(raw, rng(seed))) for seed in range(40)} == {
        "itit",  # before, before
        "iti",  # before, after: the sentences join
        "tiit",  # after, before
        "titi",  # after, after
    }


def test_threshold_keeps_what_reaches_it() -> None:
    raw = page(["zero", "one", "two"], [(0, 0.32), (1, 0.319), (2, float("nan"))])
    assert read(raw, **WHOLE) == [0, "zero one two"]
    assert read(raw, similarity_threshold=0.24, **WHOLE) == [0, "zero", 1, "one two"]
    assert reason(raw, similarity_threshold=0.4) == "no picture above the similarity threshold"


def test_several_pictures_on_one_sentence() -> None:
    assert read(page(["zero", "one"], [(1, 0.4), (1, 0.4)]), **WHOLE) == ["zero", 0, 1, "one"]


def test_solved_assignment_is_one_to_one_among_the_pictures_that_are_there() -> None:
    matrix = [[0.9, 0.8], [0.9, 0.1], [0.95, 0.95]]
    raw = page(["zero", "one"], [(0, 0.9), (0, 0.9), (1, 0.95)], similarity_matrix=matrix)
    assert read(raw, **WHOLE) == [0, 1, "zero", 2, "one"]
    failed = page(["zero", "one"], [(0, 0.9), (0, 0.9)], similarity_matrix=matrix)  # picture 2 was not downloaded
    assert read(failed, assignment="solved", **WHOLE) == [1, "zero", 0, "one"]
    assert read(raw, assignment="solved", **WHOLE) == [1, "zero", 2, "one"]
    assert reason(page(["zero"], [(0, 0.9)]), assignment="solved") == "malformed sample"


def test_small_files_are_dropped_on_request() -> None:
    raw = page(["zero"], [(0, 0.4)])
    kilobytes = len(png(0)) / 1000
    assert read(raw, min_image_kb=kilobytes, **WHOLE) == [0, "zero"]
    assert reason(raw, min_image_kb=kilobytes + 0.001) == "image file too small"


def test_url_duplicates_are_dropped_on_request() -> None:
    raw = page(["zero"], [(0, 0.4)], could_have_url_duplicate=1)
    assert read(raw, **WHOLE) == [0, "zero"]
    assert reason(raw, drop_url_duplicates=True) == "filtered: url duplicate"


def test_single_pictures_are_kept_with_their_probability() -> None:
    one, two = page(["zero"], [(0, 0.4)]), page(["zero"], [(0, 0.4), (0, 0.4)])
    keep = source("mmc4", single_image_probability=0.5)
    kept = [not isinstance(keep(one, rng(seed)), Skip) for seed in range(1000)]
    assert 450 < sum(kept) < 550
    assert reason(one, single_image_probability=0.0) == "filtered: single image"
    document(source("mmc4", single_image_probability=0.0)(two, rng()))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_info": []}, "no image"),
        ({"image_info": [{"matched_text_index": 0, "matched_sim": 0.4}]}, "no image"),
        ({"image_info": [{"matched_text_index": 0, "matched_sim": 0.4, "image_base64": "PGh0bWw+"}]}, "not an image"),
        ({"image_info": [{"matched_text_index": 0, "matched_sim": 0.4, "image_base64": "%"}]}, "not an image"),
        ({"image_info": [{"image_base64": "PGh0bWw+"}]}, "malformed sample"),
        ({"text_list": []}, "no text"),
        ({"text_list": [3]}, "malformed sample"),
        ({"text_list": None}, "malformed sample"),
    ],
)
def test_skips(change: dict[str, Any], expected: str) -> None:
    base = {"text_list": ["zero"], "image_info": []}
    assert reason(sample(json={**base, **change})) == expected
    assert reason(sample(jpg=png(0))) == "no json"


@pytest.mark.parametrize("index", [-1, 1, 10**9])
def test_a_match_outside_the_page_is_no_match(index: int) -> None:
    assert reason(page(["zero"], [(index, 0.4)])) == "no picture above the similarity threshold"


LONG = [f"{number:03d}" + "x" * 397 for number in range(100)]  # 100 estimated tokens each


@pytest.mark.slow
def test_subsequence_is_drawn_over_the_page_and_holds_a_picture() -> None:
    raw = page(LONG, [(10, 0.4), (50, 0.4), (90, 0.4)])
    starts, seen = set(), set()
    for seed in range(300):
        elements = read(raw, seed, **WHOLE)
        first = next(element for element in elements if isinstance(element, str))
        start = int(first[:3])
        near = [place for place in (10, 50, 90) if start <= place < start + 11]
        assert near and start <= 90
        starts.add(start)
        seen |= set(near)
    assert seen == {10, 50, 90} and len(starts) > 20


def test_subsequence_reaches_past_its_limit_so_that_packing_cuts() -> None:
    result = document(source("mmc4", **WHOLE)(page(LONG, [(50, 0.4)]), rng()))
    assert result.max_tokens == 1024
    assert sum(len(text) for text in texts(result)) / 4 > 1024


def test_a_short_page_is_read_from_its_beginning() -> None:
    assert read(page(["zero", "one"], [(1, 0.4)]), **WHOLE) == ["zero", 0, "one"]


def test_subsequence_has_the_first_five_pictures() -> None:
    raw = page([str(number) for number in range(8)], [(7 - number, 0.4) for number in range(8)])
    assert [element for element in read(raw, **WHOLE) if isinstance(element, int)] == [7, 6, 5, 4, 3]
    assert [element for element in read(raw, max_images=2, **WHOLE) if isinstance(element, int)] == [7, 6]


def test_matched_pictures_with_their_sentences_only() -> None:
    raw = page([str(number) for number in range(10)], [(9 - number, 0.4) for number in range(8)])
    read_matched = source("mmc4", matched_probability=1.0, image_first_probability=1.0)
    chosen = set()
    for seed in range(100):
        result = document(read_matched(raw, rng(seed)))
        assert result.max_tokens == 512 and shape(result) == "ititititit"
        assert [int(text) for text in texts(result)] == sorted(int(text) for text in texts(result))
        for image, text in zip(pictures(result), texts(result), strict=True):
            assert isinstance(image, Image) and image.encoded == png(9 - int(text))
        chosen |= set(texts(result))
    assert chosen == {str(number) for number in range(2, 10)}


def test_both_sequences_come_with_their_shares() -> None:
    both = source("mmc4")
    limits = [document(both(page(["zero"], [(0, 0.4)]), rng(seed))).max_tokens for seed in range(1000)]
    assert set(limits) == {512, 1024} and 450 < limits.count(512) < 550


def test_text_limit() -> None:
    result = source("mmc4", DataConfig(max_text_characters=10), **WHOLE)(page(["a" * 50, "b"], [(0, 0.4)]), rng())
    assert texts(result) == ["a" * 10]
