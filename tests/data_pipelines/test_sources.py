"""The registry of sources: options, workers, hostile json."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import UserError
from data_pipelines.document import Document, RawSample, Skip
from data_pipelines.sources import KINDS
from tests.data_pipelines.sources_helpers import clip, document, picture, rng, sample, shape, source, texts

PNG = picture()


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("lion", {}, ["data.sources.corpus.kind", "lion", "laion"]),
        (
            "laion",
            {"min_simil": 1},
            ["data.sources.corpus.options.min_simil", "min_similarity", "image_first_probability"],
        ),
        ("laion", {"min_similarity": "high"}, ["data.sources.corpus.options.min_similarity", "high"]),
        ("laion", {"drop_nsfw": "NSFW"}, ["data.sources.corpus.options"]),
        ("laion", {"missing_fields": "ask"}, ["data.sources.corpus.options.missing_fields", "drop or keep"]),
        ("pairs", {"caption": "top_caption"}, ["data.sources.corpus.options.caption", "json:<name>"]),
        ("pairs", {"image_first_probability": 1.5}, ["options.image_first_probability", "between 0 and 1"]),
        ("pairs", {"image_first_probability": float("nan")}, ["options.image_first_probability", "between 0 and 1"]),
        ("pairs", {"caption": None}, ["data.sources.corpus.options.caption"]),
        ("mmc4", {"assignment": "best"}, ["data.sources.corpus.options.assignment", "stored or solved"]),
        ("mmc4", {"max_images": 2.5}, ["data.sources.corpus.options.max_images"]),
        ("webvid", {"num_frames": 0}, ["data.sources.corpus.options.num_frames", "at least 1"]),
        ("webvid", {"frame_choice": "all"}, ["options.frame_choice", "random or centre"]),
        ("storyboard", {"max_frames": -1}, ["options.max_frames", "at least 1"]),
        ("text", {"text": ""}, ["data.sources.corpus.options.text", "txt or json:<name>"]),
    ],
)
def test_wrong_options_are_one_sentence(kind: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        source(kind, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("kind", KINDS)
def test_sources_travel_to_workers(kind: str) -> None:
    raw = sample(jpg=PNG, txt="a dog")
    read = source(kind)
    assert pickle.loads(pickle.dumps(read))(raw, rng()) == read(raw, rng())


def read_in_worker(read: Any, raw: RawSample) -> str:
    return shape(read(raw, rng()))


@pytest.mark.slow
def test_sources_work_in_a_spawned_process() -> None:
    raw = sample(jpg=PNG, txt="a dog")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(read_in_worker, [source("pairs"), raw]).get(timeout=120) == read_in_worker(
            source("pairs"), raw
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
IMAGE_INFO = {"matched_text_index": 0, "matched_sim": 0.4, "image_base64": "iVBORw0KGgo="}
VALID: dict[str, Any] = {
    "caption": "a dog",
    "similarity": 0.3,
    "punsafe": 0.1,
    "NSFW": "UNLIKELY",
    "text_list": ["one", "two"],
    "image_info": [IMAGE_INFO, IMAGE_INFO],
    "similarity_matrix": [[0.4, 0.1], [0.1, 0.4]],
    "duration": 10.0,
    "storyboard": {
        "tile_width": 4,
        "tile_height": 4,
        "interval": 1.0,
        "sheets": [{"columns": 2, "rows": 2, "count": 4}],
    },
    "subtitles": [{"start": 1.0, "text": "hello"}],
    "sb": {"0": [8, 8, 2, 2, 4, "webp"]},
    "subtitle": [{"start": 1.0, "text": "hello"}],
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"caption": "json:caption"}],
    "laion": [{"caption": "json:caption", "min_similarity": 0.1, "max_punsafe": 0.5, "drop_nsfw": ["NSFW"]}],
    "mmc4": [{"assignment": assignment, "matched_probability": 0.5} for assignment in ("stored", "solved")],
    "webvid": [{"caption": "json:caption"}],
    "storyboard": [{}],
    "text": [{"text": "json:caption"}],
}
SOURCES = [source(kind, **options) for kind, variants in OPTIONS.items() for options in variants]
CLIP = clip(1)


@st.composite
def hostile_json(draw: st.DrawFn) -> Any:
    """Valid json for every kind, one node of it replaced by anything."""
    root: dict[str, Any] = json.loads(json.dumps(VALID))
    node: Any = root
    key: Any = draw(st.sampled_from(sorted(root)))
    while isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans()):
        node = node[key]
        key = draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else draw(st.integers(0, len(node) - 1))
    node[key] = draw(JSON)
    return root


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(meta=JSON | hostile_json(), seed=st.integers(0, 3))
def test_hostile_json_never_raises(meta: Any, seed: int) -> None:
    shared = {"jpg": PNG, "0.jpg": PNG, "1.jpg": PNG, "mp4": CLIP}
    encoded = json.dumps(meta).encode()
    forms = [{"json": encoded, "sb_0.webp": PNG, **shared}, {"final_meta.json": encoded, "sb_0.webp": PNG}]
    for read, members in itertools.product(SOURCES, forms):
        result = read(RawSample("0", members), rng(seed))
        assert isinstance(result, (Document, Skip))
        if isinstance(result, Document):
            "".join(texts(result)).encode("utf-8")


def test_the_valid_json_of_the_hostile_test_is_valid() -> None:
    """Else the test above would only ever see skips."""
    encoded = json.dumps(VALID).encode()
    members = {"json": encoded, "jpg": PNG, "mp4": CLIP}
    for kind in ("pairs", "laion", "webvid", "text"):
        document(source(kind, **OPTIONS[kind][0])(RawSample("0", members), rng()))
    sheets = {"sb_0.webp": PNG}
    document(source("storyboard")(RawSample("0", {"json": encoded, **sheets}), rng()))
    document(source("storyboard")(RawSample("0", {"final_meta.json": encoded, **sheets}), rng()))
