"""The parts of an index that is being built: what was scanned so far, in files that survive a killed build.

Every writer has a file of its own in the work folder and appends a record per shard:

    crc32 of all that follows, length of the text, length of the chunks: 3 x uint32
    text: JSON of the shard; chunks: `ShardScan.cuts`
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from conf import UserError
from data_pipelines.shard_scan import ShardScan
from data_pipelines.stores import ShardStat

HEAD = struct.Struct("<III")


class Place(NamedTuple):
    """Where the record of a shard stands, and what has to be known before it is read again."""

    part: int
    offset: int
    num_chunks: int
    stat: ShardStat


class Parts:
    """The work folder of the index at `out`, made where it does not exist.

    settings: what all parts must have in common. Raises UserError when the folder was begun with other settings.
    """

    def __init__(self, out: Path, settings: dict) -> None:
        self.folder = out.with_name(f"{out.name}.parts")
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = self.folder / "settings.json"
        if not begun.exists():
            temporary = self.folder / f"settings.{os.getpid()}.tmp"
            temporary.write_text(json.dumps(settings) + "\n")
            temporary.replace(begun)
        if (found := json.loads(begun.read_text())) != settings:
            raise UserError(
                f"{self.folder} holds a build that was begun with {found}, not with {settings}: "
                "give the same options, or remove the folder to begin again"
            )
        self._paths: list[Path] = []

    def places(self) -> dict[str, Place]:
        """Where the newest record of each url stands. A half-written record and what follows it are passed over."""
        self._paths = sorted(self.folder.glob("*.part"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return {
            scan.url: Place(part, offset, len(scan.cuts), scan.stat)
            for part, path in enumerate(self._paths)
            for offset, scan in _records(path)
        }

    def read(self, places: Iterable[Place]) -> Iterator[ShardScan]:
        """The records at places that `places` told."""
        with ExitStack() as stack:
            current, file = -1, None
            for part, offset, *_ in places:
                if part != current or file is None:  # one open file: a job array leaves more than a process may open
                    stack.close()
                    current, file = part, stack.enter_context(self._paths[part].open("rb"))
                file.seek(offset)
                scan = _read_record(file)
                assert scan is not None, "the record was whole when its place was listed"
                yield scan

    @contextmanager
    def writer(self) -> Iterator[Callable[[ShardScan], None]]:
        """Appends records to a new part file."""
        number, name = tempfile.mkstemp(suffix=".part", dir=self.folder)
        try:
            with os.fdopen(number, "wb") as file:
                yield partial(_write_record, file)
        finally:
            if not Path(name).stat().st_size:
                Path(name).unlink()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_record(file: BinaryIO, scan: ShardScan) -> None:
    facts = {"url": scan.url, "stat": scan.stat, "defects": scan.defects, "disagreements": scan.disagreements}
    text, cuts = json.dumps(facts).encode("ascii"), scan.cuts.astype("<u4").tobytes()
    file.write(HEAD.pack(zlib.crc32(text + cuts), len(text), len(cuts)) + text + cuts)
    file.flush()


def _records(path: Path) -> Iterator[tuple[int, ShardScan]]:
    with path.open("rb") as file:
        offset = 0
        while (scan := _read_record(file)) is not None:
            yield offset, scan
            offset = file.tell()


def _read_record(file: BinaryIO) -> ShardScan | None:
    """None at the end, and where a record is cut off or damaged."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    crc, text_nbytes, cuts_nbytes = HEAD.unpack(head)
    data = file.read(text_nbytes + cuts_nbytes)
    if not text_nbytes or len(data) != text_nbytes + cuts_nbytes or zlib.crc32(data) != crc:
        return None
    facts = json.loads(data[:text_nbytes])
    cuts = np.frombuffer(data[text_nbytes:], "<u4").reshape(-1, 4)
    return ShardScan(facts["url"], ShardStat(*facts["stat"]), cuts, facts["defects"], facts["disagreements"])
