from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import UserError
from data_pipelines import loader
from data_pipelines.arena import MAX_LENT
from data_pipelines.config import DataConfig, SourceConfig, index_path
from data_pipelines.document import Batch, Cursor
from data_pipelines.index import Index, open_index
from data_pipelines.lane import Lane, share_images
from data_pipelines.loader import Loader, fingerprint, holdout_documents, open_indexes
from data_pipelines.packing import collate
from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines.corpora import IMAGE_SIZE, NUM_QUERIES

NUM_ROWS = 24
Row = tuple[Any, ...]


def make_loader(
    config: DataConfig,
    rank: int = 0,
    dp: int = 1,
    cursors: dict[int, Cursor] | None = None,
    tp: tuple[int, int] = (0, 1),
) -> Loader:
    return Loader(
        config,
        open_indexes(config, build_missing=False),
        Tokenizer(config.tokenizer),
        num_queries=NUM_QUERIES,
        image_size=IMAGE_SIZE,
        dp_rank=rank,
        dp_size=dp,
        tp_rank=tp[0],
        tp_size=tp[1],
        cursors=cursors,
    )


def rows_of(batch: Batch) -> list[Row]:
    """Everything that is to be the same for every split."""
    rows = []
    for r, keys in enumerate(batch.keys):
        images = batch.images[batch.image_starts[:, 0] == r]
        starts = batch.image_starts[batch.image_starts[:, 0] == r, 1]
        ok = batch.document_ok[r, : len(keys)]
        parts = (batch.input_ids[r], batch.document_ids[r], batch.position_ids[r], starts, ok, images)
        rows.append((keys, *(part.numpy().tobytes() for part in parts)))
    return rows


def global_batches(
    config: DataConfig, dp: int, num_steps: int, cursors: dict[int, Cursor] | None = None
) -> Iterator[tuple[list[Row], dict[int, Cursor]]]:
    """Steps of a run: the rows of all ranks, round by round in lane order, and the cursors after the step."""
    ranks = [iter(make_loader(config, rank, dp, cursors)) for rank in range(dp)]
    num_batches = config.global_batch_rows // dp // config.micro_batch_rows
    lanes_per_rank = config.lanes // dp
    for _ in range(num_steps):
        slots: list[tuple[int, int, Row]] = []
        after: dict[int, Cursor] = {}
        for number, rank in enumerate(ranks):
            batches = [next(rank) for _ in range(num_batches)]
            for slot, row in enumerate(row for batch in batches for row in rows_of(batch)):
                slots.append((slot // lanes_per_rank, number * lanes_per_rank + slot % lanes_per_rank, row))
            for batch in batches:
                after.update(batch.cursors)
        yield [row for _, _, row in sorted(slots, key=lambda slot: slot[:2])], after


def run_rows(
    config: DataConfig, dp: int, cursors: dict[int, Cursor] | None = None, num_rows: int = NUM_ROWS
) -> list[Row]:
    steps = global_batches(config, dp, num_rows // config.global_batch_rows, cursors)
    return [row for rows, _ in steps for row in rows]


@pytest.fixture(scope="module")
def reference(small_config: DataConfig) -> list[Row]:
    return run_rows(small_config, dp=1)


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int]:
    """dp, rows a step, rows a micro-batch; 4 lanes."""
    dp = draw(st.sampled_from([1, 2, 4]))
    global_rows = draw(st.sampled_from([4, 12]))
    divisors = [b for b in range(1, global_rows // dp + 1) if global_rows // dp % b == 0]
    return dp, global_rows, draw(st.sampled_from(divisors))


def split_config(config: DataConfig, split: tuple[int, int, int], **changes: Any) -> DataConfig:
    return dataclasses.replace(config, global_batch_rows=split[1], micro_batch_rows=split[2], **changes)


@settings(max_examples=8, deadline=None)
@given(splits())
def test_global_batches_do_not_depend_on_the_split(
    small_config: DataConfig, reference: list[Row], split: tuple[int, int, int]
) -> None:
    assert run_rows(split_config(small_config, split), dp=split[0]) == reference


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("split", "workers"), [((1, 8, 2), 3), ((2, 12, 3), 1)])
def test_global_batches_do_not_depend_on_the_workers(
    small_config: DataConfig, reference: list[Row], split: tuple[int, int, int], workers: int
) -> None:
    config = split_config(small_config, split, num_workers=workers, prefetch_rows=3)
    assert run_rows(config, dp=split[0]) == reference


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_shares_of_tokens_depend_on_no_split(small_config: DataConfig, reference: list[Row]) -> None:
    config = dataclasses.replace(small_config, weight_unit="tokens")
    expected = run_rows(config, dp=1)
    assert expected != reference
    assert run_rows(split_config(config, (2, 12, 3), num_workers=1, prefetch_rows=3, buffer_mb=0), dp=2) == expected
    (_, cursors), *_ = global_batches(split_config(config, (4, 12, 1)), 4, 1)
    assert run_rows(split_config(config, (1, 4, 2), num_workers=3), 1, cursors, num_rows=12) == expected[12:]


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(splits(), splits(), st.integers(1, 3))
def test_resume_at_any_step_with_another_split(
    small_config: DataConfig,
    reference: list[Row],
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    killed_after: int,
) -> None:
    num_steps = min(killed_after, 12 // before[1])
    cursors: dict[int, Cursor] = {}
    num_rows = 0
    for rows, step_cursors in global_batches(split_config(small_config, before), before[0], num_steps):
        cursors.update(step_cursors)
        num_rows += len(rows)
    assert set(cursors) == {0, 1, 2, 3}
    resumed = run_rows(split_config(small_config, after), after[0], cursors, num_rows=12)
    assert resumed == reference[num_rows : num_rows + 12]


def test_what_was_prefetched_and_not_trained_comes_again(small_config: DataConfig, reference: list[Row]) -> None:
    config = dataclasses.replace(small_config, num_workers=2, prefetch_rows=16)
    (_, cursors), *_ = list(global_batches(config, 1, 1))
    assert run_rows(config, 1, cursors, num_rows=8) == reference[8:16]


def test_seeds_and_lanes_change_the_order(small_config: DataConfig, reference: list[Row]) -> None:
    for change in ({"seed": 1}, {"lanes": 2}, {"window_rows": 7}):
        assert run_rows(dataclasses.replace(small_config, **change), dp=1) != reference


def test_a_tiny_buffer_changes_nothing(small_config: DataConfig, reference: list[Row]) -> None:
    assert run_rows(dataclasses.replace(small_config, buffer_mb=0), dp=1, num_rows=16) == reference[:16]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_error_in_a_worker_stays_one_sentence(small_config: DataConfig, workers: int) -> None:
    source = dataclasses.replace(small_config.sources["words"], holdout=1.0)
    config = dataclasses.replace(small_config, sources={"words": source}, num_workers=workers)
    others = set(children_of(os.getpid()))
    with pytest.raises(UserError, match=r"^the source 'words' gave no document[^\n]*$"):
        next(iter(make_loader(config)))
    assert wait_until_gone(set(children_of(os.getpid())) - others), "the traceback must not keep the workers"


def test_a_fault_in_a_worker_ends_all_of_them(small_config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the main process would wait for ever for them at its exit."""

    def fail(lane: Lane, out: object) -> None:
        raise RuntimeError(f"lane {lane.number} is broken")

    monkeypatch.setattr(Lane, "next_row", fail)
    others = set(children_of(os.getpid()))
    with pytest.raises(RuntimeError, match="lane 0 is broken"):
        next(iter(make_loader(dataclasses.replace(small_config, num_workers=2))))
    assert wait_until_gone(set(children_of(os.getpid())) - others)


def test_workers_do_not_overwrite_what_is_being_collated(
    small_config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collate_late(*arguments: Any) -> Batch:
        time.sleep(0.1)
        return collate(*arguments)

    config = dataclasses.replace(small_config, prefetch_rows=2)
    expected = [batch.images for batch in itertools.islice(iter(make_loader(config)), 12)]
    assert sum(map(len, expected)) > 12
    monkeypatch.setattr(loader, "collate", collate_late)
    batches = iter(make_loader(dataclasses.replace(config, num_workers=2)))
    assert all(next(batches).images.equal(images) for images in expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_held_keep_their_pictures(
    small_config: DataConfig, reference: list[Row], workers: int
) -> None:
    """Of every worker more than it lends: the first are used where they lie, the others are copies."""
    config = dataclasses.replace(small_config, num_workers=workers, prefetch_rows=2)
    held = list(itertools.islice(make_loader(config), NUM_ROWS))
    assert 2 * workers * MAX_LENT < NUM_ROWS
    assert [row for batch in held for row in rows_of(batch)] == reference


def test_workers_answer_no_signal_and_end_with_the_loader(small_config: DataConfig, reference: list[Row]) -> None:
    others = set(children_of(os.getpid()))
    batches = iter(make_loader(dataclasses.replace(small_config, num_workers=2, prefetch_rows=2)))
    rows = rows_of(next(batches))
    workers = set(children_of(os.getpid())) - others
    assert len(workers) == 2
    for worker, number in itertools.product(workers, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
        os.kill(worker, number)
    rows += [row for batch in itertools.islice(batches, 11) for row in rows_of(batch)]
    assert rows == reference[:12]
    del batches
    assert wait_until_gone(workers)


RANK = """
import itertools, pickle, sys, time
from pathlib import Path
from data_pipelines.lane import Lane, share_images
from tests.data_pipelines.test_loader import make_loader

good_rows, next_row = itertools.count(), Lane.next_row

def stall(lane, out):
    if next(good_rows) < {good_rows}:
        return next_row(lane, out)
    if not {good_rows}:
        print("stalled", flush=True)
    time.sleep(100)

Lane.next_row = stall
batches = iter(make_loader(pickle.loads(Path(sys.argv[1]).read_bytes())))
next(batches)
time.sleep(1)
print("ready", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("good_rows", "killed"), [(1000, False), (1, False), (0, True)])
def test_workers_end_with_their_rank(small_config: DataConfig, tmp_path: Path, good_rows: int, killed: bool) -> None:
    """At its own end, with the iterator still open: idle, or held up by a store; killed while they are at work."""
    config = dataclasses.replace(small_config, num_workers=2, micro_batch_rows=2, prefetch_rows=2)
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", RANK.format(good_rows=good_rows), tmp_path / "config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == ("stalled\n" if killed else "ready\n")
        workers = children_of(rank.pid)
        if killed:
            assert len(workers) == 2
            rank.kill()
        assert rank.wait(timeout=30) == (-signal.SIGKILL if killed else 0)
    assert wait_until_gone(workers)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: Iterable[int], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(is_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_indexes_are_built_once_and_only_where_allowed(small_config: DataConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(small_config, index_dir=str(tmp_path / "indexes"))
    with pytest.raises(UserError, match="no index of a corpus"):
        open_indexes(config, build_missing=False)
    built = open_indexes(config, build_missing=True)
    assert [index.num_samples for index in built.values()] == [43, 25]
    header = index_path(config, "words") / "index.json"
    written = header.stat().st_mtime_ns
    assert open_indexes(config, build_missing=True)["words"].fingerprint == built["words"].fingerprint
    assert header.stat().st_mtime_ns == written
    assert index_path(config, "words") != index_path(dataclasses.replace(config, chunk_samples=3), "words")


def test_sources_without_weight_stay_closed(small_config: DataConfig) -> None:
    missing = SourceConfig(kind="pairs", shards="missing-*.tar", weight=0.0)
    config = dataclasses.replace(small_config, sources={"off": missing, **small_config.sources})
    assert list(open_indexes(config, build_missing=True)) == ["pictures", "words"]


def test_fingerprint_tells_what_changed(small_config: DataConfig, tokenizer: Tokenizer) -> None:
    indexes = open_indexes(small_config, build_missing=False)
    before = fingerprint(small_config, indexes, tokenizer, NUM_QUERIES)

    def changed(config: DataConfig, indexes: dict[str, Index] = indexes, num_queries: int = NUM_QUERIES) -> set[str]:
        after = fingerprint(config, indexes, tokenizer, num_queries)
        return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}

    words = small_config.sources["words"]
    other_words = {**small_config.sources, "words": dataclasses.replace(words, weight=2.0)}
    assert all(isinstance(value, str) for value in before.values())
    for free in ("num_workers", "micro_batch_rows", "global_batch_rows", "buffer_mb", "index_dir", "prefetch_rows"):
        assert changed(dataclasses.replace(small_config, **{free: 77})) == set()
    assert changed(dataclasses.replace(small_config, seed=5)) == {"data.seed"}
    assert changed(dataclasses.replace(small_config, weight_unit="tokens")) == {"data.weight_unit"}
    assert changed(dataclasses.replace(small_config, sources=other_words)) == {"data.sources.words.weight"}
    assert changed(small_config, num_queries=9) == {"model.causal_transformer.num_queries"}
    assert changed(small_config, dict(reversed(indexes.items()))) == {"data.sources"}
    assert changed(small_config, {**indexes, "words": indexes["pictures"]}) == {"data.sources.words.index"}


def test_holdout_is_what_training_never_sees(small_config: DataConfig, reference: list[Row]) -> None:
    index = open_index(index_path(small_config, "pictures"))
    held_out = [key for key, _ in holdout_documents(small_config, index, "pictures")]
    assert held_out == sorted(held_out)
    assert 0 < len(held_out) < 15
    trained = {key for keys, *_ in reference for key in keys if key.source == "pictures"}
    assert not trained & set(held_out)
    assert len(trained) > 15
    nothing = open_index(index_path(small_config, "words"))
    assert list(holdout_documents(small_config, nothing, "words")) == []


def test_real_corpora_of_other_tools(real_data: Path, tmp_path: Path) -> None:
    sources = {
        "laion": SourceConfig("laion", f"{real_data}/laion/*.tar", weight=4.0),
        "laion_coco": SourceConfig("laion", f"{real_data}/laion_coco/*.tar", weight=2.0),
        "mmc4": SourceConfig("mmc4", f"{real_data}/mmc4/*.tar", weight=2.0),
        "webvid": SourceConfig("webvid", f"{real_data}/webvid/*.tar", weight=0.5),
        "storyboard": SourceConfig("storyboard", f"{real_data}/yt_storyboard/*.tar", weight=0.5),
        "corrupt": SourceConfig("laion", f"{real_data}/corrupt/*.tar", weight=2.0),
    }
    config = DataConfig(
        sources,
        str(real_data / "tokenizer" / "tokenizer.model"),
        str(tmp_path / "index"),
        seq_len=512,
        max_images_per_row=12,
        global_batch_rows=8,
        lanes=2,
        window_rows=8,
        num_workers=0,
    )
    open_indexes(config, build_missing=True)
    seen: Counter[str] = Counter()
    skips: Counter[tuple[str, str]] = Counter()
    for batch in itertools.islice(make_loader(config), 24):
        seen.update(key.source for keys in batch.keys for key in keys)
        skips.update(batch.all_skips())
        assert batch.images.dtype == torch.uint8
        assert len(batch.images) == len(batch.image_starts)
    assert set(seen) == set(sources)
    assert {source for source, _ in skips} >= {"webvid", "corrupt"}


@pytest.mark.parametrize(("tp", "workers"), [(2, 0), (3, 0), (2, 2)])
def test_tensor_parallel_ranks_decode_each_picture_once(small_config: DataConfig, tp: int, workers: int) -> None:
    """The rows of one process, every rank with its share of the pictures; broken ones are known where they are held."""
    config = dataclasses.replace(small_config, num_workers=workers)
    alone, *ranks = (
        itertools.islice(make_loader(config, tp=place), NUM_ROWS) for place in [(0, 1), *((k, tp) for k in range(tp))]
    )
    num_pictures: Counter[int] = Counter()
    failures: Counter[tuple[int, int]] = Counter()
    for whole, *parts in zip(alone, *ranks, strict=True):
        starts, places = parts[0].image_starts, [tuple(place) for place in whole.image_starts.tolist()]
        order = [places.index(tuple(place)) for place in starts.tolist()]
        assert sorted(order) == list(range(len(places)))
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images[order])
        assert all(part.image_counts == [len(other.images) for other in parts] for part in parts)
        for part in parts:
            assert torch.equal(part.input_ids, whole.input_ids) and torch.equal(part.image_starts, starts)
            assert (part.keys, part.cursors, part.skips) == (whole.keys, whole.cursors, whole.skips)
        for rank, part in enumerate(parts):
            num_pictures[rank] += len(part.images)
        first = {at: why for part in reversed(parts) for at, why in part.failures.items()}
        assert first == whole.failures
        assert torch.equal(torch.stack([part.document_ok for part in parts]).all(dim=0), whole.document_ok)
        failures.update(first.keys())
    assert failures.total() > 0
    assert max(num_pictures.values()) <= 1.3 * min(num_pictures.values())


def test_frames_of_a_video_stay_together() -> None:
    assert share_images(0, 8, 2) == [4, 4]
    assert [share_images(lane, 5, 2) for lane in (0, 1)] == [[3, 2], [2, 3]]
    assert [share_images(lane, 2, 4) for lane in range(4)] == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0]]
