"""The demo's checker on made-up answers: perfect, broken, swapped, and too many."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.demo.check import (
    ATTRIBUTES,
    Answers,
    Score,
    attribute_scores,
    check,
    confusion,
    distances,
    exact_score,
    judge,
    rank_of_own,
    read_answers,
    retrieval_score,
    summary,
)
from data_pipelines.prepare.drawn_world import DrawnObject

CIRCLE = DrawnObject("red", "circle", "small", "top left")
STAR = DrawnObject("blue", "star", "large", "bottom")
BOTH = "a small red circle at the top left and a large blue star at the bottom"


def test_a_true_caption_is_exact_whatever_its_form_and_order() -> None:
    for caption in (
        BOTH,
        "at the bottom there is a blue star and at the top left there is a red circle",
        f"{BOTH}; the circle is above the star",
        f"  {BOTH.upper()}  ",
    ):
        judgement = judge([CIRCLE, STAR], caption)
        assert judgement.exact
        assert [judgement.num_right(name) for name in ATTRIBUTES] == [2, 2, 2]


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a red circle at the bottom", (1, 1, 0)),
        ("a circle at the top left", (0, 1, 1)),
        ("red", (1, 0, 0)),
        ("at the top left", (0, 0, 0)),  # no object
        ("circle circle circle", (0, 1, 0)),
        ("red red red red at at the the", (1, 0, 0)),
        ("", (0, 0, 0)),
        ("\x00 ⁇ <s> unk", (0, 0, 0)),
    ],
)
def test_wrong_and_broken_captions(caption: str, right: tuple[int, int, int]) -> None:
    judgement = judge([CIRCLE], caption)
    assert not judgement.exact
    assert tuple(judgement.num_right(name) for name in ATTRIBUTES) == right


def test_swapped_colours_are_wrong_although_every_word_is_in_the_truth() -> None:
    judgement = judge([CIRCLE, STAR], "a blue circle at the top left and a red star at the bottom")
    assert [judgement.num_right(name) for name in ATTRIBUTES] == [0, 2, 2]
    assert not judgement.exact


def test_objects_that_agree_best_are_matched_first() -> None:
    """Taken in order, the first description would go to the circle and leave the star with the worse one."""
    described = "a blue star at the top left and a red circle at the right"
    judgement = judge([CIRCLE, STAR], described)
    said = {true.shape: description for true, description in judgement.pairs}
    assert said["circle"] is not None and said["circle"].shape == "circle"
    assert said["star"] is not None and said["star"].shape == "star"


def test_missing_and_surplus_objects_are_wrong_in_everything() -> None:
    missing = judge([CIRCLE, STAR], "a red circle at the top left")
    assert [missing.num_right(name) for name in ATTRIBUTES] == [1, 1, 1]
    assert not missing.exact and missing.num_surplus == 0
    surplus = judge([CIRCLE], BOTH)
    assert [surplus.num_right(name) for name in ATTRIBUTES] == [1, 1, 1]
    assert not surplus.exact and surplus.num_surplus == 1
    for judgement in (missing, surplus):
        assert attribute_scores([judgement])["all"].model == 0.5


def test_one_description_serves_one_object() -> None:
    red_star = DrawnObject("red", "star", "small", "bottom")
    judgement = judge([red_star, CIRCLE], "a red circle at the top left")
    assert [said is None for _, said in judgement.pairs] == [True, False]
    assert judgement.num_right("colour") == 1


def test_attribute_scores_stand_beside_the_best_constant_guess_and_chance() -> None:
    red_star = DrawnObject("red", "star", "small", "bottom")
    judgements = [
        judge([CIRCLE], "a red circle at the top left"),
        judge([red_star], "a red circle at the bottom"),
        judge([STAR], ""),
    ]
    scores = attribute_scores(judgements)
    assert scores["colour"] == Score(2 / 3, 2 / 3, 1 / 8)  # red, red, blue
    assert scores["shape"] == Score(1 / 3, 2 / 3, 1 / 6)
    assert scores["place"] == Score(2 / 3, 2 / 3, 1 / 9)
    assert scores["all"].model == pytest.approx(5 / 9)
    assert scores["all"].constant == pytest.approx(2 / 3)
    assert scores["all"].chance == pytest.approx((1 / 8 + 1 / 6 + 1 / 9) / 3)


def test_exact_score_counts_contents_without_order_or_size() -> None:
    large_circle = DrawnObject("red", "circle", "large", "top left")
    judgements = [
        judge([CIRCLE], "a red circle at the top left"),
        judge([large_circle], "a blue circle at the top left"),
        judge([CIRCLE, STAR], BOTH),
        judge([STAR, CIRCLE], ""),
    ]
    score = exact_score(judgements)
    assert (score.model, score.constant) == (0.5, 0.5)
    assert score.chance == pytest.approx((2 / 432 + 2 * 2 / 432**2) / 4)


def test_confusion_counts_true_by_said() -> None:
    counts = confusion([judge([CIRCLE], "a blue circle at the top left"), judge([STAR], "")], "colour")
    red, blue = ATTRIBUTES["colour"].index("red"), ATTRIBUTES["colour"].index("blue")
    assert counts[red, blue] == 1
    assert counts[blue, -1] == 1  # not said
    assert counts.sum() == 2


def test_distances_are_squared_distances() -> None:
    rng = np.random.default_rng(0)
    texts, images = rng.standard_normal((3, 2, 4)), rng.standard_normal((5, 2, 4))
    expected = [[((text - image) ** 2).sum() for image in images] for text in texts]
    np.testing.assert_allclose(distances(texts, images), expected, rtol=0, atol=1e-12)


def test_an_image_that_is_not_the_only_nearest_is_not_found() -> None:
    assert rank_of_own(np.array([[1.0, 2.0], [2.0, 2.0]])).tolist() == [1, 2]
    collapsed = np.zeros((4, 4))  # every image alike
    assert rank_of_own(collapsed).tolist() == [4] * 4


def test_retrieval_searches_each_group_alone() -> None:
    distance = np.ones((4, 4)) - np.eye(4)
    distance[0, 2] = -1.0  # nearer, but in the other group
    distance[3, 2] = -1.0
    assert retrieval_score(distance, [[0, 1], [2, 3]]) == Score(0.75, 0.5, 0.5)


def test_random_embeddings_score_chance() -> None:
    rng = np.random.default_rng(0)
    distance = distances(rng.standard_normal((320, 8, 16)), rng.standard_normal((320, 8, 16)))
    score = retrieval_score(distance, np.arange(320).reshape(10, 32).tolist())
    assert score.chance == 1 / 32
    assert score.model < 0.1


def test_answers_are_read_and_all_figures_made(tmp_path: Path) -> None:
    scenes = {"heldout": [("a red circle at the top left", CIRCLE), ("blue star: bottom", STAR)]}
    scenes["train_probe"] = [scenes["heldout"][1], scenes["heldout"][0]]
    write_demo(tmp_path, scenes)
    answers = read_answers(tmp_path)
    figures = {name: check(of_set) for name, of_set in answers.items()}
    json.dumps(figures)
    for of_set in figures.values():
        assert of_set["attributes"]["all"]["model"] == of_set["exact"]["model"] == of_set["retrieval"]["model"] == 1.0
        assert of_set["by_num_objects"]["1"]["num_scenes"] == 2
    assert summary(figures["heldout"]) == "caption attributes 1.00, exact 1.00, text-to-image retrieval@1 of 2 1.00"


def test_a_caption_too_few_is_an_error() -> None:
    scene = {"objects": [vars(CIRCLE)]}
    with pytest.raises(ValueError, match="zip"):
        check(Answers([scene, scene], [[0, 1]], ["a red circle at the top left"], np.zeros((2, 2))))


def write_demo(out: Path, scenes: dict[str, list[tuple[str, DrawnObject]]]) -> None:
    """Scenes with perfect answers: captions are the truth, image i's embedding is its text's."""
    captions = []
    for name, some in scenes.items():
        folder = out / "corpora" / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"caption": caption, "objects": [vars(thing)]}) for caption, thing in some]
        (folder / "scenes.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "retrieval.json").write_text(json.dumps([list(range(len(some)))]))
        captions += [json.dumps({"image": "x.png", "text": caption}) for caption, _ in some]
    predictions = out / "predictions"
    predictions.mkdir()
    (predictions / "captions.jsonl").write_text("\n".join(captions) + "\n")
    embeddings = np.random.default_rng(0).standard_normal((len(captions), 2, 3)).astype(np.float32)
    for name in ("images", "texts"):
        save_file({"embeddings": embeddings}, predictions / f"{name}.safetensors")
