"""What the preparing commands share: shards made one by one, by several tasks, again from where a killed run ended.

A finished shard NAME.tar has NAME_stats.json beside it: how many samples it holds, what was left out and why, and a
digest of what it was made from. The folder's prepare.json holds the settings of the command.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from conf import UserError
from data_pipelines.prepare.shard_writer import Sample, write_shard, write_whole
from data_pipelines.sources import MALFORMED
from data_pipelines.sources.common import SampleError

SETTINGS_FILE = "prepare.json"


class Entry(NamedTuple):
    """One thing that may become a sample.

    name: tells it from its neighbours in its input. load: the sample, or `SampleError`; the counter takes what is worth
    telling of samples that are kept ("image missing").
    """

    name: str
    load: Callable[[Counter[str]], Sample]


def unusable_entry(name: str, reason: str) -> Entry:
    """What gives no sample is an entry too: it is counted."""
    return Entry(name, partial(_refuse, reason))


def _refuse(reason: str, notes: Counter[str]) -> Sample:
    raise SampleError(reason)


class Input(NamedTuple):
    """A file or folder of entries in a fixed order. name: of its shards; fingerprint: changes with its content."""

    name: str
    fingerprint: str
    entries: Callable[[], Iterable[Entry]]


class Part(NamedTuple):
    """What goes into one shard. digest: of all that the shard is made from; entries are asked for only when needed."""

    name: str
    digest: str
    entries: Callable[[], Iterable[Entry]]


class Task(NamedTuple):
    """One of the tasks of a job array."""

    id: int
    num_tasks: int

    def owns(self, number: int) -> bool:
        return number % self.num_tasks == self.id


@dataclass
class Report:
    """Totals over the shards of this task.

    statuses: entries by what became of them, "success" or why not; notes: what is worth telling of the samples.
    """

    num_made: int = 0
    num_kept: int = 0
    nbytes: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def num_samples(self) -> int:
        return self.statuses["success"]

    def add(self, stats: dict[str, Any]) -> None:
        self.nbytes += stats["bytes"]
        self.statuses.update(stats["status_dict"])
        self.notes.update(stats["notes"])


def split_inputs(inputs: Sequence[Input], samples_per_shard: int, task: Task) -> Iterator[Part]:
    """The task's shards: each input is cut after every `samples_per_shard` entries, whatever becomes of them.

    So a shard's content depends on its input alone. Tasks share out the inputs where there are enough of them, else the
    shards of every input. Raises UserError for two inputs of one name.
    """
    twice = [name for name, times in Counter(source.name for source in inputs).items() if times > 1]
    if twice:
        raise UserError(f"several inputs are called {twice[0]}: rename them or prepare them in separate folders")
    share_inputs = len(inputs) >= task.num_tasks
    for position, source in enumerate(inputs):
        if share_inputs and not task.owns(position):
            continue
        entries = iter(source.entries())
        for number in count():
            batch = list(islice(entries, samples_per_shard))
            if not batch:
                break
            if share_inputs or task.owns(number):
                digest = digest_of(source.fingerprint, *(entry.name for entry in batch))
                yield Part(f"{source.name}-{number:05d}", digest, lambda batch=batch: batch)  # type: ignore[misc]


def make_shards(out: Path, settings: dict[str, Any], parts: Iterable[Part], unit: str, total: int | None) -> Report:
    """Make the shards that are not there yet.

    unit: what an entry is, for the progress bar; total: number of entries, where it is known.
    Raises UserError when the folder holds shards of other settings or other input, or cannot be written.
    """
    report = Report()
    try:
        open_folder(out, settings)
        with tqdm(desc=settings["command"], unit=f" {unit}", total=total, disable=None, mininterval=0.5) as bar:
            for part in parts:
                bar.set_postfix_str(part.name, refresh=False)
                stats = _read_stats(out, part)
                if stats:
                    report.num_kept += stats["bytes"] > 0
                    bar.update(stats["count"])
                else:
                    stats = _make_shard(out, part, bar)
                    report.num_made += stats["bytes"] > 0
                report.add(stats)
    except OSError as error:
        raise UserError(f"{out} is not complete ({error}): mend that and run this again") from error
    return report


def digest_of(*names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        encoded = name.encode("utf-8", "surrogateescape")
        digest.update(struct.pack("<Q", len(encoded)) + encoded)
    return digest.hexdigest()


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of the shards; raises UserError if it is there and was made with other settings, or by others."""
    path = out / SETTINGS_FILE
    if path.exists():
        made = _read_json(path)
        differing = sorted(key for key in {*made, *settings} if made.get(key) != settings.get(key))
        if differing:
            key = differing[0]
            raise UserError(
                f"{out} was made with {key}={made.get(key)} and not {settings.get(key)}: remove it or change --out"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards that this command did not make: choose another --out")
    write_whole(path, json.dumps(settings, indent=1) + "\n")


def _read_stats(out: Path, part: Part) -> dict[str, Any] | None:
    """The record of a finished shard, None when it has to be made."""
    shard, stats = out / f"{part.name}.tar", _read_json(_stats_path(out, part))
    if not stats:
        return None
    if stats.get("digest") != part.digest:
        raise UserError(f"{shard} was made from other input than what is there now: remove {out} or change --out")
    size = shard.stat().st_size if shard.exists() else 0
    return stats if size == stats.get("bytes") else None


def _make_shard(out: Path, part: Part, bar: tqdm) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    nbytes = write_shard(out / f"{part.name}.tar", _load_samples(part.entries(), statuses, notes, bar))
    stats = {
        "count": sum(statuses.values()),
        "successes": statuses["success"],
        "status_dict": dict(sorted(statuses.items())),
        "notes": dict(sorted(notes.items())),
        "bytes": nbytes,
        "digest": part.digest,
    }
    write_whole(_stats_path(out, part), json.dumps(stats, indent=1) + "\n")
    return stats


def _load_samples(entries: Iterable[Entry], statuses: Counter[str], notes: Counter[str], bar: tqdm) -> Iterator[Sample]:
    previous = None
    for entry in entries:
        bar.update()
        of_entry: Counter[str] = Counter()
        try:
            sample = entry.load(of_entry)
            if sample.key == previous:  # the two would be read as one sample
                raise SampleError("same key as the sample before")
        except SampleError as unusable:
            statuses[unusable.reason] += 1
            continue
        except MALFORMED:
            statuses["malformed"] += 1
            continue
        statuses["success"] += 1
        notes.update(of_entry)
        previous = sample.key
        yield sample


def _stats_path(out: Path, part: Part) -> Path:
    return out / f"{part.name}_stats.json"


def _read_json(path: Path) -> dict[str, Any]:
    """{} for what is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
