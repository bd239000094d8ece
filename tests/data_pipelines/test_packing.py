from __future__ import annotations

import time
from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.document import Cursor, Document, Image, PackedRow, SampleKey, Skip, Text, TokenizedDocument
from data_pipelines.packing import collate, fill, pack, tokenize_documents
from data_pipelines.tokenizer import Tokenizer

KEY = SampleKey("s", 0, 0)
Q = 3
BLOCK = Q + 2


def lay_out(tokenizer: Tokenizer, document: Document, seq_len: int = 1000, max_images: int = 10) -> TokenizedDocument:
    (result,) = tokenize_documents([(KEY, 0, document)], tokenizer, Q, seq_len, max_images)
    assert isinstance(result, TokenizedDocument)
    return result


def reference(tokenizer: Tokenizer, document: Document) -> list[int]:
    """The uncut layout, element by element."""
    ids = [tokenizer.bos]
    for element in document.elements:
        if isinstance(element, Text):
            ids += tokenizer.encode([element.text])[0]
        else:
            ids += [tokenizer.img_start, tokenizer.image, tokenizer.image, tokenizer.image, tokenizer.img_end]
    return [*ids, tokenizer.eos]


def test_layout_of_a_document(tokenizer: Tokenizer) -> None:
    pictures = [Image(b"1"), Image(b"2")]
    document = Document((Text("a red square"), pictures[0], pictures[1], Text("under")))
    laid_out = lay_out(tokenizer, document)
    assert laid_out.input_ids.tolist() == reference(tokenizer, document)
    num_text = len(tokenizer.encode(["a red square"])[0])
    assert laid_out.image_starts == [1 + num_text, 1 + num_text + BLOCK]
    assert laid_out.pictures == pictures
    assert laid_out.num_truncated_tokens == 0


ELEMENTS = st.lists(st.one_of(st.just(Image(b"x")), st.text("ab redgn", max_size=30).map(Text)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(ELEMENTS, st.integers(BLOCK + 3, 60), st.one_of(st.none(), st.integers(1, 80)), st.integers(1, 4))
def test_cuts(
    tokenizer: Tokenizer, elements: list[Text | Image], seq_len: int, max_tokens: int | None, max_images: int
) -> None:
    document = Document(tuple(elements), max_tokens)
    whole = reference(tokenizer, document)
    limit = min(seq_len, max_tokens or seq_len)
    (result,) = tokenize_documents([(KEY, 0, document)], tokenizer, Q, seq_len, max_images)
    if isinstance(result, Skip):
        assert (
            whole == [tokenizer.bos, tokenizer.eos]
            or limit == 1
            or (whole[1] == tokenizer.img_start and limit <= BLOCK)
        )
        return
    ids = result.input_ids.tolist()
    assert ids == whole[: len(ids)]
    assert result.num_truncated_tokens == len(whole) - len(ids)
    assert len(ids) <= limit and len(result.image_starts) <= max_images
    starts = [i for i, token in enumerate(ids) if token == tokenizer.img_start]
    assert result.image_starts == starts and len(result.pictures or []) == len(starts)
    assert all(ids[start + BLOCK - 1] == tokenizer.img_end for start in starts)
    if len(ids) < len(whole):  # as long as possible: full, or the next piece is a picture that does not fit
        stops_at_picture = whole[len(ids)] == tokenizer.img_start
        assert len(ids) == limit or (stops_at_picture and (len(ids) + BLOCK > limit or len(starts) == max_images))


def test_texts_are_encoded_on_their_own_and_in_one_call(tokenizer: Tokenizer) -> None:
    calls = []

    class Counting(Tokenizer):
        def __init__(self) -> None:
            self.__dict__.update(tokenizer.__dict__)

        def encode(self, texts: list[str]) -> list[list[int]]:
            calls.append(texts)
            return tokenizer.encode(texts)

    documents = [(KEY, 0, Document((Text("left"), Text("of"), Image(b"")))), (KEY, 0, Document((Text("above"),)))]
    tokenize_documents(documents, Counting(), Q, 100, 5)
    assert calls == [["left", "of", "above"]]


def documents_of(sizes: list[tuple[int, int]]) -> list[TokenizedDocument]:
    return [TokenizedDocument(KEY, 0, np.zeros(n, np.int32), [0] * images, None) for n, images in sizes]


SIZES = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 6)), max_size=60)


def pack_slowly(sizes: list[tuple[int, int]], seq_len: int, max_images: int) -> list[list[int]]:
    """Best-fit decreasing, straight from its definition."""
    order = sorted(range(len(sizes)), key=lambda d: (-fill(*sizes[d], seq_len, max_images), -sizes[d][0], d))
    rows: list[list[int]] = []

    def free(row: list[int]) -> tuple[int, int]:
        return seq_len - sum(sizes[d][0] for d in row), max_images - sum(sizes[d][1] for d in row)

    for d in order:
        fitting = [row for row in rows if free(row)[0] >= sizes[d][0] and free(row)[1] >= sizes[d][1]]
        best = min(fitting, key=free, default=None)
        if best is None:
            rows.append(best := [])
        best.append(d)
    return rows


@settings(max_examples=200, deadline=None)
@given(SIZES)
def test_pack_is_best_fit_decreasing(sizes: list[tuple[int, int]]) -> None:
    rows = pack(documents_of(sizes), 64, 6)
    assert Counter(d for row in rows for d in row) == Counter(range(len(sizes)))
    assert all(sum(sizes[d][0] for d in row) <= 64 and sum(sizes[d][1] for d in row) <= 6 for row in rows)

    def used(rows: list[list[int]]) -> list[tuple[int, int]]:
        return sorted((sum(sizes[d][0] for d in row), sum(sizes[d][1] for d in row)) for row in rows)

    # Of rows with the same space any may be taken, so the definition only tells how full the rows become.
    assert used(rows) == used(pack_slowly(sizes, 64, 6))


def test_windows_are_packed_full_and_fast() -> None:
    rng = np.random.default_rng(0)
    pairs = [(int(n), 1) for n in rng.integers(44, 90, 4000)]
    pages = [(int(n), int(i)) for n, i in zip(rng.integers(200, 2048, 80), rng.integers(0, 6, 80), strict=True)]
    begin = time.perf_counter()
    rows = pack(documents_of(pairs + pages), 2048, 24)
    assert time.perf_counter() - begin < 2
    fills = [
        fill(sum((pairs + pages)[d][0] for d in row), sum((pairs + pages)[d][1] for d in row), 2048, 24) for row in rows
    ]
    assert np.mean(fills[:-1]) > 0.98


def test_collate() -> None:
    def document(source: str, ids: list[int], starts: list[int]) -> TokenizedDocument:
        return TokenizedDocument(SampleKey(source, 1, ids[0]), 0, np.array(ids, np.int32), starts, None)

    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 2, 2)
    cursors = [Cursor(0, i, ((0, 0),)) for i in range(3)]
    first = [document("b", [5, 6, 7], []), document("a", [8, 9], [1])]
    rows = [
        PackedRow(3, cursors[0], first, images[:1], [1], {1: "broken"}, {("a", "x"): 1}),
        PackedRow(5, cursors[1], [document("b", [4, 3], [0])], images[1:], [1], {}, {("a", "x"): 2, ("b", "y"): 1}),
        PackedRow(3, cursors[2], [document("a", [2], [])], images[:0], [0]),
    ]
    batch = collate(rows, seq_len=6, pad=99, source_names=["a", "b"])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 99], [4, 3, 99, 99, 99, 99], [2, 99, 99, 99, 99, 99]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert batch.image_starts.tolist() == [[0, 4], [1, 0]]
    assert batch.images.equal(images)
    assert batch.document_sources.tolist() == [[1, 0], [1, -1], [0, -1]]
    assert batch.document_ok.tolist() == [[True, False], [True, False], [True, False]]
    assert batch.keys[0] == [SampleKey("b", 1, 5), SampleKey("a", 1, 8)]
    assert batch.cursors == {3: cursors[2], 5: cursors[1]}
    assert batch.skips == {("a", "x"): 3, ("b", "y"): 1}
    assert batch.failures == {(0, 1): "broken"}
    assert batch.all_skips() == {("a", "x"): 3, ("b", "y"): 1, ("a", "broken"): 1}
    assert batch.image_counts == [2]
    assert [t.dtype for t in (batch.input_ids, batch.document_ids, batch.position_ids, batch.image_starts)] == [
        torch.int64,
        torch.int32,
        torch.int64,
        torch.int64,
    ]


def test_collate_without_any_image() -> None:
    text = TokenizedDocument(KEY, 0, np.array([1, 2], np.int32), [], None)
    row = PackedRow(0, Cursor(0, 1, ()), [text], torch.zeros((0, 3, 2, 2), dtype=torch.uint8), [0])
    batch = collate([row, row], seq_len=4, pad=9, source_names=["s"])
    assert batch.images.shape == (0, 3, 2, 2) and batch.image_starts.shape == (0, 2)
