from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import UserError
from data_pipelines import reader as reader_module
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import Cursor, Document, PackedRow, RawSample, SampleKey, Skip
from data_pipelines.lane import Lane, LaneSettings, first_cursor
from data_pipelines.loader import open_indexes
from data_pipelines.packing import fill
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines.corpora import IMAGE_SIZE, NUM_QUERIES, make_config, sentence, write_tar, write_texts


def make_settings(config: DataConfig, tokenizer: Tokenizer, buffer_bytes: int = 1 << 30) -> LaneSettings:
    indexes = open_indexes(config, build_missing=True)
    readers = [SourceReader(name, config, index) for name, index in indexes.items()]
    return LaneSettings(config, readers, tokenizer, NUM_QUERIES, IMAGE_SIZE, buffer_bytes)


def make_lane(settings: LaneSettings, number: int, cursor: Cursor | None = None) -> Lane:
    return Lane(number, settings, cursor or first_cursor(number, len(settings.readers)))


def content(row: PackedRow) -> tuple[Any, ...]:
    ids = [(d.key, d.epoch, d.input_ids.tolist(), d.image_starts) for d in row.documents]
    return row.lane, row.cursor, ids, row.images.numpy().tobytes(), row.failures, row.skips


UNITS = pytest.mark.parametrize("weight_unit", ["documents", "tokens"])


@UNITS
def test_each_sample_of_an_epoch_is_emitted_once_or_counted(
    small_config: DataConfig, tokenizer: Tokenizer, weight_unit: str
) -> None:
    """The lanes are read until all of them are past epoch 1: epochs 0 and 1 are then complete."""
    settings = make_settings(dataclasses.replace(small_config, weight_unit=weight_unit), tokenizer)
    seen: Counter[tuple[SampleKey, int]] = Counter()
    skipped: Counter[tuple[str, int, str]] = Counter()
    for reader in settings.readers:
        counted_document = reader.document

        def document(key: SampleKey, epoch: int, sample: RawSample, inner: Any = counted_document) -> Document | Skip:
            result = inner(key, epoch, sample)
            if isinstance(result, Skip):
                skipped[key.source, epoch, result.reason] += 1
            return result

        reader.document = document  # type: ignore[method-assign]
    for number in range(small_config.lanes):
        lane = make_lane(settings, number)
        ends = [2 * reader.units.num_units for reader in settings.readers]
        position = first_cursor(number, 2).sources
        while any(q < end for (q, _), end in zip(position, ends, strict=True)):
            row = lane.next_row()
            position = row.cursor.sources
            seen.update((document.key, document.epoch) for document in row.documents)
    assert max(seen.values()) == 1
    held_out = {}
    for reader in settings.readers:
        samples = [pair for chunk in range(reader.index.num_chunks) for pair in reader.samples(chunk)]
        held_out[reader.name] = sum(reader.is_held_out(sample) for _, sample in samples)
    assert held_out["pictures"] > 0
    for epoch in (0, 1):
        for reader in settings.readers:
            emitted = sum(key.source == reader.name and e == epoch for key, e in seen)
            unusable = sum(n for (source, e, _), n in skipped.items() if (source, e) == (reader.name, epoch))
            assert emitted + unusable + held_out[reader.name] == reader.index.num_samples
    assert skipped["pictures", 0, "empty caption"] > 0


@UNITS
def test_skip_counts_of_a_window_belong_to_its_first_row(
    small_config: DataConfig, tokenizer: Tokenizer, weight_unit: str
) -> None:
    """Emitted and skipped samples of whole windows are all samples between the windows' positions."""
    settings = make_settings(dataclasses.replace(small_config, weight_unit=weight_unit), tokenizer)
    lane = make_lane(settings, 1)
    rows = [lane.next_row()]
    while rows[-1].cursor.window < 3:
        rows.append(lane.next_row())
    counted = sum((Counter(row.skips) for row in rows), Counter())
    before_packing = {reason: n for (source, reason), n in counted.items() if reason in ("held out", "empty caption")}
    emitted = Counter(document.key.source for row in rows for document in row.documents)
    reader = settings.readers[0]
    end, offset = rows[-1].cursor.sources[0]
    units = [reader.units.unit(q) for q in range(1, end, small_config.lanes)]
    num_read = sum(unit.last - unit.first for unit in units) + offset
    assert emitted["pictures"] + sum(before_packing.values()) == num_read


@pytest.fixture(scope="module", params=["documents", "tokens"])
def unit_config(small_config: DataConfig, request: pytest.FixtureRequest) -> DataConfig:
    return dataclasses.replace(small_config, weight_unit=request.param)


@pytest.fixture(scope="module")
def all_rows(unit_config: DataConfig, tokenizer: Tokenizer) -> list[PackedRow]:
    lane = make_lane(make_settings(unit_config, tokenizer), 2)
    return [lane.next_row() for _ in range(24)]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 22))
def test_a_lane_goes_on_from_any_cursor(
    unit_config: DataConfig, tokenizer: Tokenizer, all_rows: list[PackedRow], killed_after: int
) -> None:
    lane = make_lane(make_settings(unit_config, tokenizer), 2, all_rows[killed_after].cursor)
    rest = [lane.next_row() for _ in range(len(all_rows) - killed_after - 1)]
    assert [content(row) for row in rest] == [content(row) for row in all_rows[killed_after + 1 :]]


@pytest.mark.parametrize("buffer_bytes", [0, 3000])
def test_a_small_buffer_changes_nothing(
    unit_config: DataConfig, tokenizer: Tokenizer, all_rows: list[PackedRow], buffer_bytes: int
) -> None:
    lane = make_lane(make_settings(unit_config, tokenizer, buffer_bytes), 2)
    rows = [lane.next_row() for _ in range(15)]
    assert [content(row) for row in rows] == [content(row) for row in all_rows[:15]]


def test_the_buffer_bounds_the_bytes_held(small_config: DataConfig, tokenizer: Tokenizer) -> None:
    lane = make_lane(make_settings(small_config, tokenizer, 3000), 2)
    lane.next_row()
    window = lane._window
    assert window is not None
    pictures = [p for row in window.rows for document in row for p in document.pictures or []]
    assert 0 < sum(len(p.encoded) for p in pictures) <= 3000
    assert any(document.pictures is None for row in window.rows for document in row)


def test_broken_pictures_are_blank_and_counted(all_rows: list[PackedRow]) -> None:
    num_broken = 0
    for row in all_rows:
        images = iter(row.images)
        for d, document in enumerate(row.documents):
            ok = d not in row.failures
            picture_number = 30 * document.key.shard + document.key.index
            assert ok == (document.key.source == "words" or picture_number % 11 != 5)
            for _ in document.image_starts:
                assert bool(next(images).any()) == ok
            num_broken += not ok
    assert num_broken > 0
    assert {reason for row in all_rows for _, reason in row.skips} <= {"held out", "empty caption"}


def test_rows_do_not_leave_in_packing_order(all_rows: list[PackedRow]) -> None:
    """Packed rows begin with ever smaller documents; in the keyed order they must not, or windows start with pages."""
    windows: list[list[float]] = [[]]
    for row in all_rows:
        first = row.documents[0]
        windows[-1].append(fill(len(first.input_ids), len(first.image_starts), 96, 5))
        if row.cursor.row == 0:
            windows.append([])
    assert all(sizes != sorted(sizes, reverse=True) for sizes in windows if len(sizes) > 5)
    assert any(len(sizes) > 5 for sizes in windows)


def test_the_mixture_counts_emitted_documents(small_config: DataConfig, tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(small_config, window_rows=20)
    counts: Counter[str] = Counter()
    settings = make_settings(config, tokenizer)
    for number in range(4):
        lane = make_lane(settings, number)
        rows = [lane.next_row() for _ in range(80)]
        counts.update(document.key.source for row in rows for document in row.documents)
    assert abs(counts["pictures"] / sum(counts.values()) - 0.75) < 0.01


@pytest.fixture(scope="module")
def unequal_config(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> DataConfig:
    """Half of the tokens from documents that fill half a row, a fifth from documents of a few tokens."""
    folder = tmp_path_factory.mktemp("unequal")
    words = {"short": 2, "middle": 40, "long": 300}
    for name, max_words in words.items():
        samples = [{"__key__": f"{i:04d}", "txt": sentence(i, max_words)} for i in range(300)]
        write_tar(folder / f"{name}.tar", samples)
    weights = {"short": 2.0, "middle": 3.0, "long": 5.0}
    sources = {name: SourceConfig("text", str(folder / f"{name}.tar"), weight=weights[name]) for name in words}
    return DataConfig(
        sources,
        str(tokenizer_path),
        str(folder / "index"),
        seq_len=256,
        lanes=2,
        window_rows=32,
        weight_unit="tokens",
        chunk_samples=16,
    )


def token_shares(rows: list[PackedRow]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for row in rows:
        for document in row.documents:
            counts[document.key.source] += len(document.input_ids)
    return {source: count / counts.total() for source, count in counts.items()}


@pytest.mark.slow
def test_the_mixture_counts_emitted_tokens(unequal_config: DataConfig, tokenizer: Tokenizer) -> None:
    settings = make_settings(unequal_config, tokenizer)
    lane = make_lane(settings, 1)
    rows = [lane.next_row() for _ in range(1000)]
    documents = [document for row in rows for document in row.documents]
    lengths = {name: [len(d.input_ids) for d in documents if d.key.source == name] for name in ("long", "short")}
    assert np.mean(lengths["long"]) > 15 * np.mean(lengths["short"])
    assert token_shares(rows) == pytest.approx({"short": 0.2, "middle": 0.3, "long": 0.5}, abs=0.01)


def test_windows_smaller_than_a_document_mix_and_resume(unequal_config: DataConfig, tokenizer: Tokenizer) -> None:
    """Shares of a row of 64 tokens, and most documents are as long: where all sources pass, the next window follows."""
    sources = {name: unequal_config.sources[name] for name in ("middle", "long")}
    config = dataclasses.replace(unequal_config, sources=sources, seq_len=64, window_rows=1)
    settings = make_settings(config, tokenizer)
    lane = make_lane(settings, 0)
    rows = [lane.next_row() for _ in range(600)]
    assert len({row.cursor.window for row in rows}) < rows[-1].cursor.window, "no window was empty"
    assert token_shares(rows) == pytest.approx({"middle": 3 / 8, "long": 5 / 8}, abs=0.03)
    for killed_after in range(40):
        resumed = make_lane(settings, 0, rows[killed_after].cursor)
        assert content(resumed.next_row()) == content(rows[killed_after + 1])


@pytest.mark.slow
def test_second_windows_are_staggered_and_rows_well_filled(small_config: DataConfig, tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(small_config, window_rows=40)
    settings = make_settings(config, tokenizer)
    for number in range(4):
        lane = make_lane(settings, number)
        tokens = {0: 0, 1: 0, 2: 0}
        for _ in range(160):
            row = lane.next_row()
            window = row.cursor.window - (row.cursor.row == 0)
            if window in tokens:
                tokens[window] += sum(len(document.input_ids) for document in row.documents)
        for window, rows in ((0, 40), (1, 10 * (number + 1)), (2, 40)):
            assert rows <= tokens[window] / 96 <= rows + 32


@pytest.mark.parametrize("change", [{"holdout": 1.0}, {"options": {"text": "json:missing"}}])
def test_a_source_without_documents_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, small_config: DataConfig, change: dict[str, Any]
) -> None:
    source = SourceConfig(kind="text", shards=str(write_texts(tmp_path / "t.tar", 0, 25)), **change)
    config = dataclasses.replace(small_config, sources={"words": source}, index_dir=str(tmp_path))
    lane = make_lane(make_settings(config, tokenizer), 0)
    with pytest.raises(UserError, match=r"'words' gave no document in 500 samples \((held out|no text) 500\)"):
        lane.next_row()


def test_barren_samples_are_counted_in_a_row(
    small_config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other sample is skipped: never many in a row, but many in a window."""
    make_document = SourceReader.document

    def every_other(reader: SourceReader, key: SampleKey, epoch: int, sample: RawSample) -> Document | Skip:
        return make_document(reader, key, epoch, sample) if key.index % 2 else Skip("even")

    monkeypatch.setattr(SourceReader, "document", every_other)
    monkeypatch.setattr(reader_module, "MAX_BARREN_SAMPLES", 60)
    lane = make_lane(make_settings(dataclasses.replace(small_config, window_rows=60), tokenizer), 3)
    assert lane.next_row().skips["pictures", "even"] > 60


def test_a_corpus_of_one_sample(tmp_path: Path, tokenizer: Tokenizer, small_config: DataConfig) -> None:
    source = SourceConfig(kind="text", shards=str(write_texts(tmp_path / "t.tar", 0, 1)))
    config = dataclasses.replace(small_config, sources={"words": source}, index_dir=str(tmp_path))
    assert make_lane(make_settings(config, tokenizer), 3).next_row().documents


def test_documents_without_tokens_do_not_loop_for_ever(
    tmp_path: Path, tokenizer: Tokenizer, small_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SourceReader, "document", lambda *_: Document(()))
    lane = make_lane(make_settings(small_config, tokenizer), 0)
    with pytest.raises(UserError, match="no text and no picture"):
        lane.next_row()


def test_a_shard_that_changed_under_the_index_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path
) -> None:
    config = make_config(tmp_path, tokenizer_path)
    settings = make_settings(config, tokenizer)
    shard = Path(settings.readers[1].index.url(0))
    data, stat = bytearray(shard.read_bytes()), shard.stat()
    data[: len(data) // 2] = bytes(len(data) // 2)
    shard.write_bytes(bytes(data))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither size nor time tells
    with pytest.raises(UserError, match=r"does not hold at byte .* run python -m data_pipelines"):
        for number in range(4):
            make_lane(settings, number).next_row()


def test_a_small_corpus_is_read_epoch_after_epoch(tmp_path: Path, tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    write_texts(tmp_path / "t.tar", 0, 20)
    source = SourceConfig(kind="text", shards=str(tmp_path / "t.tar"))
    config = DataConfig(
        {"words": source},
        str(tokenizer_path),
        str(tmp_path / "index"),
        seq_len=96,
        lanes=1,
        window_rows=8,
        num_workers=0,
    )
    lane = make_lane(make_settings(config, tokenizer), 0)
    epochs: dict[int, list[int]] = {}
    for _ in range(60):
        for document in lane.next_row().documents:
            epochs.setdefault(document.epoch, []).append(document.key.index)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
