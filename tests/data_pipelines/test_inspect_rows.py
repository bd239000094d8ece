"""Packed rows for the eye: layout, targets and pictures of a row, the page and the drawing."""

from __future__ import annotations

import base64
import dataclasses
import re
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from data_pipelines.config import DataConfig
from data_pipelines.document import Batch, SampleKey
from data_pipelines.inspecting.packed_rows import Run, ShownRow, show_row, target_kinds
from data_pipelines.inspecting.preview import make_preview, render
from data_pipelines.inspecting.row_drawing import BAR, HEADER, MARGIN, PALETTE, ROW, WIDTH, draw_rows
from data_pipelines.inspecting.settings import Opened, Settings, open_all
from data_pipelines.tokenizer import Tokenizer
from models.objective import find_targets
from tests.data_pipelines.corpora import IMAGE_SIZE, NUM_QUERIES
from tests.data_pipelines.test_loader import make_loader


class Letters:
    """A tokenizer of four words; ids 5 to 8 are [PAD], [IMG], [/IMG], <image>."""

    pad, img_start, img_end = 5, 6, 7

    def decode(self, ids: list[int]) -> str:
        return " ".join("?<>ab"[i] for i in ids if 3 <= i < 5)


def batch() -> Batch:
    """One row: `<s> a [IMG] <image> <image> [/IMG] b </s>`, `<s> b </s>` whose picture broke, one padding."""
    ids = [1, 3, 6, 8, 8, 7, 4, 2, 1, 4, 2, 5]
    documents = [1] * 8 + [2] * 3 + [0]
    return Batch(
        input_ids=torch.tensor([ids]),
        document_ids=torch.tensor([documents], dtype=torch.int32),
        position_ids=torch.zeros(1, 12, dtype=torch.int64),
        images=torch.full((1, 3, 4, 4), 255, dtype=torch.uint8),
        image_starts=torch.tensor([[0, 2]]),
        image_counts=[1],
        document_sources=torch.tensor([[0, 1]]),
        document_ok=torch.tensor([[True, False]]),
        keys=[[SampleKey("laion", 0, 0), SampleKey("webvid", 0, 0)]],
        cursors={},
        failures={(0, 1): "broken"},
        skips={},
    )


def shown() -> ShownRow:
    return show_row(batch(), 0, 2, Letters())  # type: ignore[arg-type]


def test_a_row_shows_what_is_learnt_where() -> None:
    row = shown()
    assert row.targets == [
        Run("none", 1),  # <s>
        Run("text", 1),
        Run("none", 1),  # [IMG]
        Run("image", 3),  # two slots and [/IMG]
        Run("text", 2),
        Run("none", 4),  # the broken document, padding
    ]
    assert (row.num_padding, row.length, row.num_pictures) == (1, 12, 1)
    first, second = row.documents
    assert (first.ok, second.ok) == (True, False)
    assert first.layout == [Run("text", 2), Run("image", 4), Run("text", 2)]
    assert [(piece.text, piece.num_targets) for piece in first.pieces] == [("a", 1), ("", 3), ("b", 2)]
    assert base64.b64decode(first.pieces[1].uri.partition(",")[2]).startswith(b"\x89PNG")
    assert [(piece.text, piece.num_targets) for piece in second.pieces] == [("b", 0)]


def test_targets_are_those_of_the_objective(small_config: DataConfig, tokenizer: Tokenizer) -> None:
    """Every 11th picture of this corpus is broken."""
    num_broken = 0
    for batch in islice(make_loader(dataclasses.replace(small_config, micro_batch_rows=2)), 10):
        sources = (batch.document_ok, batch.document_sources, batch.image_starts, NUM_QUERIES)
        targets = find_targets(batch.input_ids, batch.document_ids, *sources, tokenizer.text_vocab_size)
        expected = np.full(batch.input_ids.numel(), "none")
        expected[targets.text_positions.numpy() + 1] = "text"
        expected = expected.astype("<U5")
        expected[targets.image_positions.numpy().ravel() + 1] = "image"
        found = [target_kinds(batch, row, NUM_QUERIES, tokenizer) for row in range(2)]
        np.testing.assert_array_equal(np.concatenate(found), expected)
        num_broken += int((~batch.document_ok & (batch.document_sources >= 0)).sum())
    assert num_broken


def test_the_drawing_has_a_colour_for_every_document() -> None:
    picture = np.asarray(draw_rows([shown(), shown()]))
    assert picture.shape == (HEADER + 2 * ROW, WIDTH, 3)
    bar = picture[HEADER + ROW + 24 + BAR // 2]
    scale = (WIDTH - 2 * MARGIN) / 12
    at = [tuple(int(value) for value in bar[int(MARGIN + position * scale)]) for position in (0.5, 7.5, 10.8, 11.5)]
    assert at == [hexadecimal(colour) for colour in (PALETTE[0], PALETTE[0], PALETTE[1], "#e9eef2")]


def hexadecimal(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_texts_cannot_inject_into_the_page() -> None:
    row = shown()
    hostile = "<script>alert(1)</script>"
    row.documents[1].pieces = [dataclasses.replace(row.documents[1].pieces[0], text=hostile)]
    row.documents[1].key = SampleKey(hostile, 0, 0)
    page = render([row], {(hostile, "x"): 1}, 12, [hostile])
    assert hostile not in page and "&lt;script&gt;" in page
    assert page.lstrip().startswith("<!doctype html>")


@pytest.fixture(scope="module")
def opened(small_config: DataConfig) -> Opened:
    return open_all(Settings(small_config, NUM_QUERIES, IMAGE_SIZE))


def test_a_preview_shows_the_first_rows_and_needs_nothing_else(opened: Opened, tmp_path: Path) -> None:
    preview = make_preview(opened, 5, tmp_path / "made" / "here")
    batches = list(islice(make_loader(opened.settings.data), 5))
    assert [[d.key for d in row.documents] for row in preview.rows] == [batch.keys[0] for batch in batches]
    page = preview.page.read_text()
    num_images = sum(len(batch.images) for batch in batches)
    assert page.count("data:image/png;base64,") == num_images > 0
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|url\(|<script|<link""", page)
    assert 'name="viewport"' in page
    with PIL.Image.open(preview.picture) as picture:
        assert picture.size == (WIDTH, HEADER + 5 * ROW)
