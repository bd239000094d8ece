"""Packed rows as one picture: a bar per row, the thumbnails at their places, and a bar of what is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import PIL.Image
from PIL import ImageDraw, ImageFont

from data_pipelines.inspecting.packed_rows import IMAGE, Piece, ShownRow

PALETTE = ("#2f6db3", "#d97b29", "#2e9662", "#8a5cc2", "#c24d57", "#6b7a87", "#1797a6", "#b0892b")
TARGET_COLOURS = {"text": "#3d4f5e", "image": "#e2b100", "none": "#d5dce2"}
PAPER, INK, SOFT, PADDING, BROKEN = "#ffffff", "#22303c", "#5c6b77", "#e9eef2", "#c0392b"
WIDTH, MARGIN = 1600, 24
BAR, TARGETS, GAP, THUMBNAIL = 34, 12, 26, 64
HEADER, ROW = 56, 28 + BAR + 4 + TARGETS + GAP + THUMBNAIL + 28


def draw_rows(rows: Sequence[ShownRow]) -> PIL.Image.Image:
    picture = PIL.Image.new("RGB", (WIDTH, HEADER + ROW * len(rows)), PAPER)
    canvas = ImageDraw.Draw(picture)
    _draw_legend(canvas)
    for number, row in enumerate(rows):
        _draw_row(picture, canvas, row, number, HEADER + number * ROW)
    return picture


def _draw_legend(canvas: ImageDraw.ImageDraw) -> None:
    labels = {"text": "next word", "image": "next visual embedding", "none": "not learnt"}
    x = _write(canvas, MARGIN, 18, "a colour per document, hatched = picture; lower bar, what is learnt:", SOFT) + 16
    for kind, label in labels.items():
        canvas.rectangle((x, 20, x + 13, 33), fill=TARGET_COLOURS[kind])
        x = _write(canvas, x + 20, 18, label, SOFT) + 18


def _write(canvas: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str) -> float:
    """Where the text ends."""
    font = ImageFont.load_default(15)
    canvas.text((x, y), text, fill=colour, font=font)
    return x + canvas.textlength(text, font=font)


def _draw_row(picture: PIL.Image.Image, canvas: ImageDraw.ImageDraw, row: ShownRow, number: int, top: int) -> None:
    scale = (WIDTH - 2 * MARGIN) / row.length
    title = f"row {number + 1}: {len(row.documents)} documents, {row.num_pictures} pictures, {row.num_padding} padding"
    _write(canvas, MARGIN, top, title, INK)
    top += 24
    canvas.rectangle((MARGIN, top, WIDTH - MARGIN, top + BAR), fill=PADDING)
    position = 0
    for d, document in enumerate(row.documents):
        x = MARGIN + position * scale
        for run in document.layout:
            end = x + run.length * scale
            _draw_run(canvas, (x, top, end, top + BAR), PALETTE[d % len(PALETTE)], run.kind == IMAGE)
            x = end
        if not document.ok:
            canvas.line((MARGIN + position * scale, top + BAR, x, top), fill=BROKEN, width=3)
        canvas.line((x, top, x, top + BAR), fill=PAPER, width=1)
        position += document.length
    x, below = float(MARGIN), top + BAR + 4
    for run in row.targets:
        canvas.rectangle((x, below, x + run.length * scale, below + TARGETS), fill=TARGET_COLOURS[run.kind])
        x += run.length * scale
    _draw_thumbnails(picture, canvas, row, scale, below + TARGETS)


def _draw_run(canvas: ImageDraw.ImageDraw, box: tuple[float, float, float, float], colour: str, hatched: bool) -> None:
    canvas.rectangle(box, fill=colour)
    left, top, right, bottom = box
    for x in range(int(left), int(right) - 3, 6) if hatched else ():
        canvas.line((x, bottom, x + 3, top), fill=PAPER, width=1)


def _draw_thumbnails(
    picture: PIL.Image.Image, canvas: ImageDraw.ImageDraw, row: ShownRow, scale: float, top: int
) -> None:
    """Side by side, in order, each tied to the middle of its slots."""
    places = list(_picture_places(row))
    size = min(THUMBNAIL, (WIDTH - 2 * MARGIN) // max(1, len(places)) - 2)
    free = float(MARGIN)
    for number, (middle, piece) in enumerate(places):
        assert piece.picture is not None
        anchor = MARGIN + middle * scale
        last = WIDTH - MARGIN - (len(places) - number) * (size + 2)
        left = int(min(max(free, anchor - size / 2), last))
        canvas.line((anchor, top, left + size / 2, top + GAP), fill=SOFT)
        picture.paste(piece.picture.resize((size, size)), (left, top + GAP))
        if not piece.num_targets:
            canvas.rectangle((left, top + GAP, left + size, top + GAP + size), outline=BROKEN, width=2)
        free = left + size + 2


def _picture_places(row: ShownRow) -> Iterator[tuple[float, Piece]]:
    """Middle position of the slots, and the picture."""
    begin = 0
    for document in row.documents:
        pictures = [piece for piece in document.pieces if piece.picture is not None]
        slots, position = [], begin
        for run in document.layout:
            if run.kind == IMAGE:
                slots.append((position, run.length))
            position += run.length
        yield from zip(_middles(slots, len(pictures)), pictures, strict=True)
        begin += document.length


def _middles(slots: list[tuple[int, int]], num_pictures: int) -> list[float]:
    """Pictures that stand side by side are one run of slots; all take equally many."""
    size = sum(length for _, length in slots) / max(1, num_pictures)
    return [
        start + (number + 0.5) * size for start, length in slots for number in range(round(length / size))
    ]  # fmt: skip
