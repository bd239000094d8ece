"""The parts of the demo's report: marked words, packed rows, charts, and a page that needs nothing but itself."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from benchmarks.demo import examples, packed_rows
from benchmarks.demo.check import Answers, judge
from benchmarks.demo.report import all_charts, curve, mixture, render, shares
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Batch, SampleKey
from data_pipelines.inspecting.packed_rows import show_row
from data_pipelines.prepare.drawn_world import DrawnObject
from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig
from tests.data_pipelines.test_inspect_rows import Letters, batch
from trainer.config import PretrainConfig

CIRCLE = DrawnObject("red", "circle", "small", "top left")
STAR = DrawnObject("blue", "star", "large", "left")


def marked(objects: list[DrawnObject], caption: str) -> list[tuple[str, str]]:
    words = list(examples.mark_words(caption, judge(objects, caption)))
    assert "".join(piece for piece, _ in words) == caption
    return [(piece, mark) for piece, mark in words if mark != examples.PLAIN]


def test_words_are_judged_by_the_object_that_they_describe() -> None:
    assert marked(
        [CIRCLE, STAR], "a blue circle at the top left and a red star at the left; the star is left of the circle"
    ) == [
        ("blue", "wrong"),
        ("circle", "right"),
        ("top left", "right"),
        ("red", "wrong"),
        ("star", "right"),
        ("left", "right"),
    ]


def test_the_same_word_twice_is_judged_twice() -> None:
    words = marked([CIRCLE, STAR], "a red circle at the top left and a red star at the left")
    assert [mark for word, mark in words if word == "red"] == ["right", "wrong"]
    twice = marked([CIRCLE], "a red circle at the top left and a red circle at the top left")
    assert [mark for _, mark in twice] == ["right"] * 3 + ["wrong"] * 3


def test_words_of_surplus_objects_are_wrong_and_broken_text_stays_readable() -> None:
    assert marked([CIRCLE], "Red circle and pink")[-1] == ("pink", "wrong")
    assert marked([CIRCLE], "Red circle") == [("Red", "right"), ("circle", "right")]
    assert marked([CIRCLE], "<script>") == []


def answers() -> Answers:
    scene = {"caption": "a red circle at the top left", "objects": [vars(CIRCLE)], "file": "a.png"}
    distance = np.ones((4, 4)) - np.eye(4)
    distance[2] = [0.0, 1.0, 2.0, 3.0]
    captions = ["a red circle at the top left"] * 3 + ["nothing"]
    return Answers([scene] * 4, [[0, 1, 2, 3]], captions, distance)


def test_examples_are_the_first_and_failures_are_among_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    captions = examples.caption_examples(answers(), tmp_path)
    assert [example.exact for example in captions["one"]] == [True, True, True, False]
    assert captions["two"] == captions["failed"] == []
    assert captions["one"][3].num_missing == 1
    first = examples.retrieval_examples(answers(), tmp_path)["first"]
    assert [example.rank for example in first] == [1, 1, 3, 1]
    assert [own for _, own in first[2].nearest] == [False, False, True, False]


def config() -> PretrainConfig:
    sources = {"laion": SourceConfig("laion", "x.tar", weight=3.0), "webvid": SourceConfig("webvid", "y.tar")}
    model = ModelConfig("tiny", causal_transformer=CausalTransformerConfig(num_queries=2))
    model.language_model = LanguageModelConfig(text_vocab_size=5)
    return PretrainConfig(run_dir="run", model=model, data=DataConfig(sources, "tokenizer.model"))


def test_rows_are_chosen_to_show_many_sources() -> None:
    def with_sources(*rows: str) -> Batch:
        made = batch()
        made.keys = [[SampleKey(source, 0, 0) for source in row] for row in rows]
        return made

    assert packed_rows.choose_rows([with_sources("a", "ab"), with_sources("c", "a")]) == [(0, 1), (1, 0), (0, 0)]
    assert packed_rows.choose_rows([with_sources("a")]) == [(0, 0)]


def test_the_mixture_compares_what_was_asked_for_with_what_came() -> None:
    records = [{"targets/text/laion": 30, "targets/text/webvid": 10}, {"targets/image/webvid": 5}]
    rows = packed_rows.RowSample([], packed_rows.Counter(laion=1, webvid=1), 1)
    laion, webvid = mixture(config(), records, rows)
    assert [laion[name] for name in ("weight", "documents", "text_targets", "image_targets")] == [0.75, 0.5, 0.75, 0.0]
    assert webvid["image_targets"] == 1.0
    assert shares({"laion": 0}) == {"laion": 0.0}


def test_a_curve_leaves_out_steps_without_the_value() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": None}, {"step": 4, "loss": 1.0}]
    drawn = curve(records, "loss", "text", "red")
    assert (drawn.steps, drawn.values) == ([1, 4], [2.0, 1.0])


def test_charts_show_the_resume_and_the_limits() -> None:
    records = [{"step": step, "loss/text": 2.0, "loss/text/laion": 3.0, "grad_norm": 1.0} for step in (1, 2, 3)]
    charts = {drawing.chart.title: drawing for drawing in all_charts(records, {"laion": "#111111"}, config(), 2)}
    assert [line.curve.name for line in charts["Text loss"].lines] == ["laion", "all sources"]
    assert [mark.step for _, mark in charts["Text loss"].marks] == [2]
    assert [level.value for _, level in charts["Gradient norm before clipping"].levels] == [config().optim.grad_clip]
    assert charts["Effective rank"].lines == []


def test_confusions_are_darker_where_they_are_more() -> None:
    page = page_with({"one": [], "two": [], "failed": []})
    assert "rgb(47 109 179 / 0.75); color: #fff" in page and "rgb(47 109 179 / 0.25); color: inherit" in page


def test_captions_cannot_inject_into_the_page() -> None:
    hostile = "<script>alert(1)</script>"
    example = examples.CaptionExample("data:,", hostile, [(hostile, "plain")], False, 1)
    page = page_with(captions={"one": [example], "two": [], "failed": []})
    assert hostile not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)  # nothing from elsewhere
    assert not re.search(r"@import|url\(", page)


def page_with(captions: dict[str, list[examples.CaptionExample]]) -> str:
    score = {"model": 0.9, "constant": 0.2, "chance": 0.1}
    figures = {
        "num_scenes": 2,
        "attributes": {"all": score, "colour": score},
        "exact": score,
        "by_num_objects": {"1": {"num_scenes": 2, "attributes": score, "exact": score}},
        "retrieval": score,
        "retrieval_group": 32,
        "retrieval_groups": 1,
        "missing_objects": 0,
        "surplus_objects": 0,
    }
    row = show_row(batch(), 0, 2, Letters())  # type: ignore[arg-type]
    return render(
        figures={"heldout": figures, "train_probe": figures},
        headline=[{"title": "right", **score}],
        captions=captions,
        retrieval={"first": [examples.RetrievalExample("red", "data:,", [("data:,", True)], 1, 32)], "failed": []},
        rows=packed_rows.RowSample([row], packed_rows.Counter(), 1),
        seq_len=12,
        sources={"laion": "#111111", "webvid": "#222222"},
        charts=all_charts([{"step": 1, "loss/text": 2.0}], {}, config(), 1),
        confusions={"colour": {"values": ["red", "blue", "not said"], "counts": [[3, 1, 0], [0, 0, 0]]}},
        mixture=[],
        skips={"laion: empty caption": 2},
        resume={"exact": False, "resumed_from": 2, "steps": [], "fragment_files": {"fragments-0": False}},
        facts={"model": "emu_tiny", "machine": "2 cores"},
        stages={"corpora": 1.5},
    )


def test_a_resume_that_is_not_exact_is_told() -> None:
    assert "not the same" in page_with({"one": [], "two": [], "failed": []})
