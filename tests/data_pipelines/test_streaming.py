"""Rows from stores that fail: the same as from local files, or an end with one sentence."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from rich.console import Console

from conf import UserError
from data_pipelines import retries
from data_pipelines.config import DataConfig
from data_pipelines.document import Batch, Cursor
from data_pipelines.inspecting import lint
from data_pipelines.inspecting.display import show_info
from data_pipelines.inspecting.info import MixtureInfo, source_info
from data_pipelines.inspecting.lint import lint_source
from data_pipelines.inspecting.settings import Settings, open_all
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.retries import UnreachableError
from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines.corpora import IMAGE_SIZE, NUM_QUERIES, write_pairs
from tests.data_pipelines.faulty_server import FAULTS, FaultyServer, serving
from tests.data_pipelines.test_loader import NUM_ROWS, Row, reference, rows_of  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(retries, "MAX_DELAY_S", 0.01)


@pytest.fixture
def folder(small_config: DataConfig, tmp_path: Path) -> Path:
    """A copy of the shards, which a test may change."""
    source = Path(small_config.sources["words"].shards).parent
    for shard in source.glob("*.tar"):
        shutil.copy(shard, tmp_path)
    return tmp_path


def streamed(config: DataConfig, url: str, folder: Path, **changes: object) -> DataConfig:
    """`config` with its shards at `url`, indexed there; the server must work while this runs."""
    patterns = {"pictures": f"{url}/pairs-{{0,1}}.tar", "words": f"{url}/text-0.tar"}
    sources = {
        name: dataclasses.replace(source, shards=patterns[name], index="") for name, source in config.sources.items()
    }
    settings = {"index_dir": str(folder / "index"), "retry_minutes": 5.0, **changes}
    return dataclasses.replace(config, sources=sources, **settings)


def batches_of(
    config: DataConfig, cursors: dict[int, Cursor] | None = None, log: Path | None = None
) -> Iterator[Batch]:
    indexes = open_indexes(config, build_missing=True)
    return iter(
        Loader(
            config,
            indexes,
            Tokenizer(config.tokenizer),
            num_queries=NUM_QUERIES,
            image_size=IMAGE_SIZE,
            dp_rank=0,
            dp_size=1,
            cursors=cursors,
            unreachable_log=log,
        )
    )


def rows(batches: Iterator[Batch], number: int = NUM_ROWS) -> list[Row]:
    return [row for batch in itertools.islice(batches, number) for row in rows_of(batch)]


def shard_requests(server: FaultyServer, name: str) -> list[tuple[int, int]]:
    return [(first, last) for requested, first, last in server.requests if requested == name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("weight_unit", ["documents", "tokens"])
def test_a_failing_server_gives_the_rows_of_local_files(
    small_config: DataConfig, folder: Path, weight_unit: str, workers: int
) -> None:
    local = dataclasses.replace(small_config, weight_unit=weight_unit)
    with serving(folder, fault_share=0.2, seed=workers) as server:
        config = streamed(local, server.url, folder, num_workers=workers, prefetch_mb=1, request_timeout_s=1.0)
        assert rows(batches_of(config)) == rows(batches_of(local))
        assert set(server.faults) > set(FAULTS), "every failure was met"


@pytest.mark.slow
def test_one_failing_request_in_five(
    small_config: DataConfig,
    folder: Path,
    reference: list[Row],  # noqa: F811
) -> None:
    with serving(folder, fault_share=0.2, seed=5) as server:
        config = streamed(small_config, server.url, folder, prefetch_mb=0, request_timeout_s=1.0)
        assert rows(batches_of(config), 16) == reference[:16]
        num_failed = sum(server.faults[fault] for fault in FAULTS)
        assert 0 < num_failed < len(server.requests)


def test_prefetch_fetches_nothing_else_and_no_chunk_twice(
    small_config: DataConfig,
    folder: Path,
    reference: list[Row],  # noqa: F811
) -> None:
    with serving(folder) as server:
        config = streamed(small_config, server.url, folder)
        open_indexes(config, build_missing=True)
        server.requests.clear()
        assert rows(batches_of(config), 8) == reference[:8]
        with_prefetch = sorted(server.requests)
        server.requests.clear()
        rows(batches_of(dataclasses.replace(config, prefetch_mb=0)), 8)
        assert set(server.requests) <= set(with_prefetch)
        assert len(with_prefetch) <= len(server.requests) + 2 * small_config.lanes


def test_a_second_run_reads_from_the_cache(
    small_config: DataConfig,
    folder: Path,
    reference: list[Row],  # noqa: F811
) -> None:
    with serving(folder) as server:
        config = streamed(small_config, server.url, folder, cache_dir=str(folder / "cache"), prefetch_mb=0)
        assert rows(batches_of(config), 16) == reference[:16]
        server.requests.clear()
        assert rows(batches_of(config), 16) == reference[:16]
        assert not server.requests


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("where", ["http", "local"])
def test_a_shard_replaced_under_the_run_is_noticed(
    small_config: DataConfig, folder: Path, same_size: bool, where: str
) -> None:
    with serving(folder) as server:
        url = server.url if where == "http" else str(folder)
        config = streamed(small_config, url, folder, prefetch_mb=0)
        batches = batches_of(config)
        next(batches)
        before = (folder / "pairs-0.tar").stat().st_size
        if same_size:
            content = (folder / "pairs-0.tar").read_bytes()
            (folder / "pairs-0.tar").write_bytes(content.replace(b"red", b"RED"))
        else:
            write_pairs(folder / "pairs-0.tar", 100, 36)
        assert ((folder / "pairs-0.tar").stat().st_size == before) == same_size
        with pytest.raises(UserError, match=r"older than its shard \S*pairs-0\.tar: run [^\n]*$"):
            rows(batches)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreachable_shard_ends_the_run_with_one_sentence(
    small_config: DataConfig, folder: Path, workers: int
) -> None:
    with serving(folder) as server:
        config = streamed(small_config, server.url, folder, retry_minutes=0.001, num_workers=workers)
        open_indexes(config, build_missing=True)
        server.down.add("pairs-1.tar")
        with pytest.raises(UserError, match=r"^the shard \S*pairs-1\.tar could not [^\n]*503[^\n]* data\.skip_[^\n]*$"):
            rows(batches_of(config))
        assert len(set(shard_requests(server, "pairs-1.tar"))) < len(shard_requests(server, "pairs-1.tar"))
        (folder / "text-0.tar").unlink()
        with pytest.raises(UserError, match=r"text-0\.tar cannot be read \(404 Not Found\)"):
            rows(batches_of(config))


@pytest.mark.slow
def test_what_was_passed_over_stays_so_on_resume(small_config: DataConfig, folder: Path) -> None:
    """From every cursor after the failure, with a server that works again: the rows of the run that met the failure."""
    log = folder / "unreachable.jsonl"
    with serving(folder) as server:
        config = streamed(small_config, server.url, folder, retry_minutes=0.0, skip_unreachable=True, prefetch_mb=0)
        config = dataclasses.replace(config, lanes=2, global_batch_rows=2)
        healthy = rows(batches_of(config), 12)
        server.down.add("pairs-1.tar")
        stream = batches_of(config, log=log)
        batches = list(itertools.islice(stream, 12))
        server.down.clear()
        batches += itertools.islice(stream, 12)
        failing = [row for batch in batches for row in rows_of(batch)]
        assert failing[:12] != healthy

        num_refilled = 0
        for stop in range(12, 24, config.lanes):  # slot 0 is lane 0's again after a whole round
            cursors = {lane: cursor for batch in batches[:stop] for lane, cursor in batch.cursors.items()}
            assert all(len(json.dumps(dataclasses.astuple(cursor))) < 1000 for cursor in cursors.values())
            num_refilled += sum(bool(cursor.unreachable) for cursor in cursors.values())
            assert rows(batches_of(config, cursors), 24 - stop) == failing[stop:]
        assert num_refilled > 0, "a window that had passed something over was filled again"
    told = [json.loads(line) for line in log.read_text().splitlines()]
    skipped = sum(n for batch in batches for (_, reason), n in batch.all_skips().items() if reason == "unreachable")
    assert {line["shard"] for line in told} == {f"{server.url}/pairs-1.tar"}
    assert sum(line["num_samples"] for line in told) >= skipped > 0
    assert not any(key.source == "pictures" and key.shard == 1 for batch in batches[:12] for key in batch.keys[0])


def test_a_picture_that_became_unreachable_is_blank(small_config: DataConfig, folder: Path) -> None:
    """With no buffer, pictures are read again when their row leaves; by then the store may be gone."""
    with serving(folder) as server:
        config = streamed(
            small_config, server.url, folder, retry_minutes=0.0, skip_unreachable=True, buffer_mb=0, prefetch_mb=0
        )
        whole = list(itertools.islice(batches_of(dataclasses.replace(config, lanes=1, global_batch_rows=1)), 2))
        batches = batches_of(dataclasses.replace(config, lanes=1, global_batch_rows=1))
        next(batches)
        server.down |= {"pairs-0.tar", "pairs-1.tar"}
        batch = next(batches)
        assert batch.keys == whole[1].keys
        assert len(batch.images) == len(whole[1].images) > 0
        assert not batch.images.any()
        assert any(reason == "unreachable" for _, reason in batch.all_skips())


def test_lint_advises_what_it_does_itself(small_config: DataConfig, folder: Path) -> None:
    with serving(folder) as server:
        config = streamed(small_config, server.url, folder, retry_minutes=0.0)
        open_indexes(config, build_missing=True)
        server.down.add("pairs-1.tar")
        found = lint_source("pictures", config, None, None)
    assert found.num_samples == 30
    assert len(found.broken) == 1 and found.broken[0].endswith(f"503 Service Unavailable): {lint.REMEDY}")


def test_info_passes_over_what_a_run_would(small_config: DataConfig, folder: Path) -> None:
    with serving(folder) as server:
        config = streamed(small_config, server.url, folder, retry_minutes=0.0)
        opened = open_all(Settings(config, NUM_QUERIES, IMAGE_SIZE))
        server.down.add("pairs-1.tar")
        pictures = opened.readers()[0]
        with pytest.raises(UnreachableError, match=r"pairs-1\.tar .* pass over such chunks"):
            source_info(pictures, opened, 1000)
        skipping = dataclasses.replace(opened.settings, data=dataclasses.replace(config, skip_unreachable=True))
        opened = dataclasses.replace(opened, settings=skipping)
        info = source_info(opened.readers()[0], opened, 1000)
    assert (info.num_samples, info.num_looked_at, info.num_unreachable) == (43, 30, 13)
    console = Console(width=120, file=io.StringIO())
    show_info({"pictures": info}, MixtureInfo("documents"), console)
    assert "not looked at pictures: 13 unreachable samples" in console.file.getvalue()


@pytest.mark.slow
def test_everything_unreachable_is_an_end(small_config: DataConfig, folder: Path) -> None:
    with serving(folder) as server:
        config = streamed(small_config, server.url, folder, retry_minutes=0.0, skip_unreachable=True, prefetch_mb=0)
        config = dataclasses.replace(config, lanes=1, global_batch_rows=1)
        open_indexes(config, build_missing=True)
        server.down |= {"pairs-0.tar", "pairs-1.tar"}
        with pytest.raises(UserError, match=r"gave no document in 860 samples \(unreachable"):
            next(batches_of(config))


@pytest.mark.slow
def test_an_s3_server_gives_the_rows_of_local_files(
    small_config: DataConfig,
    folder: Path,
    reference: list[Row],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        fs = fsspec.filesystem("s3")
        fs.mkdir("corpus")
        for shard in folder.glob("*.tar"):
            fs.put_file(str(shard), f"corpus/{shard.name}")
        config = streamed(small_config, "s3://corpus", folder)
        assert rows(batches_of(config), 16) == reference[:16]
        assert rows(batches_of(dataclasses.replace(config, num_workers=2)), 16) == reference[:16]
        content = (folder / "pairs-0.tar").read_bytes()
        fs.pipe_file("corpus/pairs-0.tar", content.replace(b"red", b"RED"))
        with pytest.raises(UserError, match=r"older than its shard s3://corpus/pairs-0\.tar"):
            rows(batches_of(config))
        fs.rm("corpus/text-0.tar")
        with pytest.raises(UnreachableError, match=r"text-0\.tar cannot be read"):
            rows(batches_of(config))
    finally:
        server.stop()
