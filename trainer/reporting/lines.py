"""A file of JSON lines that a run appends to, read as it grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class LineFile:
    """Each reading goes on behind the last line of the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> Iterator[dict[str, Any]]:
        """Objects of the lines that have come since; none if there is no file.

        A last line without its end is being written, or was cut by a kill: it is left for the next reading. A line that
        is not JSON was cut as well.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record
