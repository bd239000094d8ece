"""Text without pictures."""

from __future__ import annotations

import pytest

from data_pipelines.config import DataConfig
from data_pipelines.document import Document, Skip, Text
from tests.data_pipelines.sources_helpers import rng, sample, source


def test_text_members() -> None:
    assert source("text")(sample(txt=" words \n"), rng()) == Document((Text("words"),))
    assert source("text", text="json:body")(sample(json={"body": "words"}), rng()) == Document((Text("words"),))


def test_long_text_is_cut() -> None:
    assert source("text", DataConfig(max_text_characters=3))(sample(txt="words"), rng()) == Document((Text("wor"),))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"jpg": b""}, "no text"),
        ({"txt": " "}, "empty text"),
        ({"txt": b"\xff"}, "text is not utf-8"),
        ({"txt": "words", "json": b"["}, "json does not parse"),
    ],
)
def test_skips(members: dict[str, object], expected: str) -> None:
    assert source("text")(sample(**members), rng()) == Skip(expected)
