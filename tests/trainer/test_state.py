"""What a resumed lane goes on with when the mixture has changed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Cursor, PackedRow, SampleKey
from data_pipelines.lane import Lane, LaneSettings
from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines.conftest import tokenizer_path  # noqa: F401 # a fixture
from tests.data_pipelines.corpora import make_config, write_pairs, write_texts
from tests.data_pipelines.test_lane import make_lane, make_settings
from trainer.state import _restore_cursor

THEN = {"pairs": 3.0, "texts": 1.0}
NOW = {"pairs": 1.0, "texts": 0.0, "more": 4.0}


@pytest.fixture(params=["documents", "tokens"])
def config(tmp_path: Path, tokenizer_path: Path, request: pytest.FixtureRequest) -> DataConfig:  # noqa: F811
    write_pairs(tmp_path / "pairs.tar", 0, 60)
    write_texts(tmp_path / "texts.tar", 0, 30)
    write_pairs(tmp_path / "more.tar", 200, 60)
    sources = {
        "pairs": SourceConfig("pairs", str(tmp_path / "pairs.tar")),
        "texts": SourceConfig("text", str(tmp_path / "texts.tar")),
        "more": SourceConfig("pairs", str(tmp_path / "more.tar")),
    }
    config = make_config(tmp_path, tokenizer_path, sources=sources)
    return dataclasses.replace(config, weight_unit=request.param)


def settings(config: DataConfig, weights: dict[str, float]) -> LaneSettings:
    """Lanes of a run whose sources are numbered as in `weights`, weights of 0 and all."""
    sources = {name: dataclasses.replace(config.sources[name], weight=1.0) for name in weights}
    made = make_settings(dataclasses.replace(config, sources=sources), Tokenizer(config.tokenizer))
    for name, weight in weights.items():
        sources[name].weight = weight
    made.__post_init__()
    return made


def keys(row: PackedRow) -> list[tuple[SampleKey, int]]:
    return [(document.key, document.epoch) for document in row.documents]


def rows_of_a_window(lane: Lane, window: int) -> list[PackedRow]:
    """The rows that are left of the window in which the lane stands."""
    rows = [lane.next_row()]
    while rows[-1].cursor.window == window:
        rows.append(lane.next_row())
    return rows


def test_a_window_ends_by_the_weights_it_began_with_and_no_sample_is_lost_or_repeated(config: DataConfig) -> None:
    old, new = settings(config, THEN), settings(config, NOW)
    first = make_lane(old, 0).next_row()
    assert first.cursor.row == 1, "the test wants a lane within a window"
    unbroken = rows_of_a_window(make_lane(old, 0, first.cursor), 0)

    cursor = _restore_cursor(0, dataclasses.asdict(first.cursor), THEN, NOW)
    lane = make_lane(new, 0, cursor)
    changed = rows_of_a_window(lane, 0)
    assert list(map(keys, changed)) == list(map(keys, unbroken))
    assert changed[-1].cursor.sources[:2] == unbroken[-1].cursor.sources
    assert changed[-1].cursor.weights == ()

    later = Counter(key for _ in range(8) for key in keys(lane.next_row()))
    assert {key.source for key, _ in later} == {"pairs", "more"}
    before = {key for row in [first, *changed] for key in keys(row)}
    assert not [key for key in later if key in before or later[key] > 1]


def test_a_second_change_within_a_window_keeps_the_first_weights() -> None:
    saved = dataclasses.asdict(Cursor(4, 2, ((8, 0), (4, 3)), (), (3.0, 1.0)))
    again = _restore_cursor(0, saved, {"pairs": 5.0, "texts": 5.0}, {"pairs": 1.0, "texts": 1.0, "more": 1.0})
    assert again == Cursor(4, 2, ((8, 0), (4, 3), (0, 0)), (), (3.0, 1.0, 0.0))


def test_a_window_not_begun_and_equal_weights_take_those_of_the_configuration() -> None:
    at_the_start = dataclasses.asdict(Cursor(4, 0, ((8, 0), (4, 3))))
    assert _restore_cursor(0, at_the_start, THEN, NOW).weights == ()
    within = dataclasses.asdict(Cursor(4, 2, ((8, 0), (4, 3))))
    assert _restore_cursor(0, within, THEN, THEN) == Cursor(4, 2, ((8, 0), (4, 3)))
