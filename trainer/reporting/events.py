"""What events.jsonl tells, as far as a page shows it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

from trainer.reporting.lines import LineFile

MOST_SHOWN = 200


class Events:
    """counts: by kind. steps: by kind, in the order of the file. newest: the last ones, oldest first. last: by kind,
    with its place in the file."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)
        self.counts: Counter[str] = Counter()
        self.steps: dict[str, list[int]] = defaultdict(list)
        self.newest: deque[dict[str, Any]] = deque(maxlen=MOST_SHOWN)
        self.last: dict[str, tuple[int, dict[str, Any]]] = {}

    def read_new(self) -> None:
        for record in self._file.read_new():
            kind, step = record.get("event"), record.get("step")
            if not isinstance(kind, str) or not isinstance(step, int):
                continue
            self.counts[kind] += 1
            self.steps[kind].append(step)
            self.newest.append(record)
            self.last[kind] = (self.counts.total(), record)

    def is_open(self, trouble: str, mended: str) -> bool:
        """Whether the last event of these two kinds is the trouble."""
        return self.last.get(trouble, (0, {}))[0] > self.last.get(mended, (0, {}))[0]
