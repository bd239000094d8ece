"""Building the index of a corpus from the headers of its tars, in parallel, and again from where a build stopped."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from conf import UserError
from data_pipelines.index import FORMAT_VERSION, Index, open_index
from data_pipelines.index_parts import Parts, Place
from data_pipelines.index_writer import IndexSettings, write_index
from data_pipelines.processes import end_with_parent
from data_pipelines.shard_scan import ShardScan, scan_shard
from data_pipelines.shards import expand_shards, stat_shard
from data_pipelines.stores import is_local

log = logging.getLogger(__name__)

MAX_FAILED_SHARDS = 100
"""More of them mean that the storage is out of reach, and each may have been tried for minutes."""
SHARDS_AHEAD = 4
"""Of each worker: so much is handed out before its results are taken."""


@dataclass
class ScanReport:
    """What became of the shards of one call: scanned now, scanned by an earlier call, failed (url -> why)."""

    num_scanned: int = 0
    num_earlier: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def build_index(
    source: str,
    patterns: str | Sequence[str],
    out: str | Path,
    *,
    chunk_samples: int = 64,
    chunk_mb: float = 4.0,
    workers: int = 1,
) -> Index:
    """Index the shards of `patterns` into the folder `out`, which appears only when it is complete.

    A chunk holds at most `chunk_samples` samples and `chunk_mb` MiB, or a single larger sample. Damaged shards are
    indexed as far as they are whole, with a warning. An index that stands at `out` is replaced. What is scanned stays
    in `out`.parts until then, so that the next call goes on where a killed one stopped. workers: processes.

    Raises UserError when no shard or no sample is found, a shard cannot be read, or `out` is another kind of folder.
    """
    settings, out = _settings(source, patterns, chunk_samples, chunk_mb), Path(out)
    _check_out(out)
    urls = _expand(settings.patterns)
    parts = Parts(out, _part_settings(settings))
    report = _scan_missing(urls, parts, settings, workers)
    if report.failed:
        raise UserError(_why_incomplete(report, len(urls)))
    every = parts.places()
    places = {url: every[url] for url in urls}
    if not any(place.num_chunks for place in places.values()):
        parts.remove()
        raise UserError(
            f"the shards {' '.join(settings.patterns)!r} hold no sample: they must be tars of WebDataset samples"
        )
    _write(out, settings, places, parts)
    parts.remove()
    return open_index(out)


def scan_share(
    source: str,
    patterns: str | Sequence[str],
    out: str | Path,
    task_id: int,
    num_tasks: int,
    *,
    chunk_samples: int = 64,
    chunk_mb: float = 4.0,
    workers: int = 1,
) -> ScanReport:
    """Scan part `task_id` of `num_tasks` of the shards; `build_index` makes the index of what all tasks scanned.

    Raises UserError as `build_index`.
    """
    settings, out = _settings(source, patterns, chunk_samples, chunk_mb), Path(out)
    _check_out(out)
    urls = _expand(settings.patterns)
    urls = urls[len(urls) * task_id // num_tasks : len(urls) * (task_id + 1) // num_tasks]
    report = _scan_missing(urls, Parts(out, _part_settings(settings)), settings, workers)
    if report.failed:
        raise UserError(_why_incomplete(report, len(urls)))
    return report


def _settings(source: str, patterns: str | Sequence[str], chunk_samples: int, chunk_mb: float) -> IndexSettings:
    return IndexSettings(source, [patterns] if isinstance(patterns, str) else list(patterns), chunk_samples, chunk_mb)


def _part_settings(settings: IndexSettings) -> dict:
    return {"format": FORMAT_VERSION, "chunk_samples": settings.chunk_samples, "chunk_mb": settings.chunk_mb}


def _check_out(out: Path) -> None:
    if out.exists() and not (out / "index.json").exists():
        raise UserError(f"{out} exists and is no index: choose another folder for it")


def _expand(patterns: list[str]) -> list[str]:
    return sorted({url for pattern in patterns for url in expand_shards(pattern)})


def _why_incomplete(report: ScanReport, num_shards: int) -> str:
    first = next(iter(report.failed.values()))
    if num_shards == 1:
        return first
    gave_up = f" (more were not tried after {len(report.failed)})" if len(report.failed) >= MAX_FAILED_SHARDS else ""
    return (
        f"{len(report.failed)} of {num_shards} shards could not be scanned{gave_up}, so there is no index yet: mend "
        f"that and run the same command again, which scans only what is missing; the first: {first}"
    )


def _scan_missing(urls: list[str], parts: Parts, settings: IndexSettings, workers: int) -> ScanReport:
    earlier = parts.places()
    missing = [url for url in urls if url not in earlier or _has_changed(url, earlier[url])]
    report = ScanReport(num_earlier=len(urls) - len(missing))
    scan = partial(_try_scan, chunk_samples=settings.chunk_samples, chunk_bytes=int(settings.chunk_mb * 2**20))
    progress = tqdm(
        desc=f"index {settings.source}", unit="shard", total=len(urls), initial=report.num_earlier, disable=None
    )
    num_samples = 0
    with parts.writer() as write, progress:
        for url, result in _in_processes(scan, missing, workers):
            progress.update()
            if isinstance(result, str):
                log.warning("not scanned: %s", result)
                report.failed[url] = result
                if len(report.failed) >= MAX_FAILED_SHARDS:
                    break
                continue
            write(result)
            report.num_scanned += 1
            num_samples += result.num_samples
            progress.set_postfix(samples=num_samples, refresh=False)
            for defect in result.defects:
                log.warning("%s: %s (its other %d samples are used)", url, defect, result.num_samples)
    return report


def _has_changed(url: str, place: Place) -> bool:
    """Remote shards are not asked again: the reader sees when they are others than were scanned."""
    if not is_local(url):
        return False
    try:
        return stat_shard(url) != place.stat
    except UserError:
        return True


def _try_scan(url: str, chunk_samples: int, chunk_bytes: int) -> tuple[str, ShardScan | str]:
    try:
        return url, scan_shard(url, chunk_samples, chunk_bytes)
    except UserError as error:
        return url, str(error)
    except OSError as error:
        return url, f"the shard {url} cannot be read ({error})"


Scanned = tuple[str, "ShardScan | str"]


def _in_processes(scan: Callable[[str], Scanned], urls: list[str], workers: int) -> Iterator[Scanned]:
    """Results as they come. Reading headers is work for the interpreter, which threads would share out badly."""
    if workers == 1:
        yield from map(scan, urls)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, _begin_worker, (os.getpid(),)) as pool:
        pending: set[Future[Scanned]] = set()
        try:
            for url in urls:
                pending.add(pool.submit(scan, url))
                if len(pending) >= SHARDS_AHEAD * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(pending))
        except BrokenProcessPool as error:
            raise UserError(
                "a process that scans shards was killed, perhaps for want of memory: run the same command again with "
                "fewer --workers, it goes on where this one stopped"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker(parent_pid: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells what Ctrl-C means
    end_with_parent(parent_pid)


def _write(out: Path, settings: IndexSettings, places: dict[str, Place], parts: Parts) -> None:
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        sizes = {url: place.stat.size for url, place in places.items()}
        num_chunks = sum(place.num_chunks for place in places.values())
        write_index(temporary, settings, sizes, num_chunks, parts.read(places.values()))
        _replace(out, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(out: Path, temporary: Path) -> None:
    """A folder cannot be renamed onto another one: the old index steps aside first."""
    if out.exists():
        retired = out.with_name(f"{out.name}.old-{os.getpid()}")
        out.rename(retired)
        temporary.rename(out)
        shutil.rmtree(retired)
    else:
        temporary.rename(out)
