"""The first packed rows of a run, to look at: a page that needs nothing but itself, and a picture."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data_pipelines.inspecting.packed_rows import ShownRow, show_row
from data_pipelines.inspecting.row_drawing import PALETTE, draw_rows
from data_pipelines.inspecting.settings import Opened
from data_pipelines.inspecting.templates import template_environment
from data_pipelines.loader import Loader


@dataclass
class Preview:
    """skips: (source, reason) -> samples passed over until the last row."""

    rows: list[ShownRow]
    skips: Counter[tuple[str, str]]
    page: Path
    picture: Path


def make_preview(opened: Opened, num_rows: int, out: Path) -> Preview:
    """Write preview.html and preview.png into the folder `out`."""
    rows, skips = read_rows(opened, num_rows)
    out.mkdir(parents=True, exist_ok=True)
    page, picture = out / "preview.html", out / "preview.png"
    page.write_text(render(rows, skips, opened.settings.data.seq_len, list(opened.indexes)), encoding="utf-8")
    draw_rows(rows).save(picture)
    return Preview(rows, skips, page, picture)


def read_rows(opened: Opened, num_rows: int) -> tuple[list[ShownRow], Counter[tuple[str, str]]]:
    settings = opened.settings
    loader = Loader(
        dataclasses.replace(settings.data, num_workers=0, micro_batch_rows=1),
        opened.indexes,
        opened.tokenizer,
        num_queries=settings.num_queries,
        image_size=settings.image_size,
        dp_rank=0,
        dp_size=1,
    )
    rows, skips = [], Counter[tuple[str, str]]()
    for batch in tqdm(islice(loader, num_rows), desc="preview", unit=" rows", total=num_rows, disable=None):
        rows.append(show_row(batch, 0, settings.num_queries, opened.tokenizer))
        skips.update(batch.all_skips())
    return rows, skips


def colours_of(row: ShownRow) -> list[str]:
    """A colour per document; neighbours differ."""
    return [PALETTE[number % len(PALETTE)] for number in range(len(row.documents))]


def render(rows: Sequence[ShownRow], skips: Mapping[tuple[str, str], int], seq_len: int, sources: Sequence[str]) -> str:
    page = template_environment().get_template("preview.html.j2")
    return page.render(rows=rows, skips=skips, seq_len=seq_len, sources=sources, colours_of=colours_of)
