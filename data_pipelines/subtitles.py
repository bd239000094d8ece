"""Subtitles as the web delivers them (WebVTT, SubRip, YouTube's json3), read into lines of speech."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

FORMATS = ("json3", "vtt", "srt")
TIME = r"(?:(\d{1,4}):)?([0-5]?\d):([0-5]?\d)[.,](\d{3})"
TIMING = re.compile(rf"\s*{TIME}\s*-->\s*{TIME}")
TAG = re.compile(r"<[^<>]*>")
WORD_TAG = re.compile(r"<(?:c|\d{1,4}:\d\d:\d\d\.\d{3})>")
BLINK_SECONDS = 0.05
"""Rolling captions stand still for 10 ms between two lines; no person writes cues so short."""


class Line(NamedTuple):
    """What is said from ``start`` on for ``duration`` seconds."""

    start: float
    duration: float
    text: str


class _Cue(NamedTuple):
    start: float
    end: float
    rows: list[str]


def parse_subtitles(content: str, form: str) -> list[Line]:
    """Lines in time order, without empty ones. form: one of `FORMATS`.

    Rolling captions, in which a cue repeats the row above it, give each row once. Raises ValueError for a json3 that is
    none; what is no cue in the other forms is passed over.
    """
    lines = _parse_json3(content) if form == "json3" else _parse_cues(content)
    return sorted((line for line in lines if line.text), key=lambda line: line.start)


def _parse_json3(content: str) -> list[Line]:
    """Automatic captions hold each word once; the events between them (aAppend) are line breaks only."""
    lines = []
    for event in json.loads(content)["events"]:
        text = "".join(str(segment.get("utf8", "")) for segment in event.get("segs") or [])
        start, duration = _seconds(event.get("tStartMs")), _seconds(event.get("dDurationMs"))
        lines.append(Line(start, duration, " ".join(text.split())))
    return lines


def _seconds(milliseconds: Any) -> float:
    value = float(milliseconds or 0)
    if not math.isfinite(value):
        raise ValueError("a time that is not finite")
    return value / 1000


def _parse_cues(content: str) -> list[Line]:
    cues = list(_split_cues(content))
    if WORD_TAG.search(content) or any(_is_blink(cue, after) for cue, after in pairwise(cues)):
        return _unroll(cues)
    return [Line(cue.start, _round(cue.end - cue.start), _join(cue.rows)) for cue in cues]


def _split_cues(content: str) -> Iterator[_Cue]:
    """A cue is a line of times and the rows up to an empty line (a row of one space is none)."""
    times: tuple[float, float] | None = None
    rows: list[str] = []
    for line in [*content.splitlines(), ""]:
        timing = TIMING.match(line)
        if times and (timing or line == ""):
            yield _Cue(*times, rows)
            times = None
        if timing:
            parts = timing.groups()
            times, rows = (_clock(parts[:4]), _clock(parts[4:])), []
        elif times:
            rows.append(TAG.sub("", line).strip())


def _clock(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, milliseconds = (int(part or 0) for part in parts)
    return (hours * 3_600_000 + minutes * 60_000 + seconds * 1000 + milliseconds) / 1000


def _is_blink(cue: _Cue, after: _Cue) -> bool:
    rows = _spoken(cue.rows)
    return cue.end - cue.start <= BLINK_SECONDS and bool(rows) and rows == _spoken(after.rows)[: len(rows)]


def _unroll(cues: list[_Cue]) -> list[Line]:
    """The rows of each cue that were not on the screen in the cue before; a cue without new rows prolongs the last."""
    lines: list[Line] = []
    shown: list[str] = []
    for cue in cues:
        rows = _spoken(cue.rows)
        fresh = rows[_overlap(shown, rows) :]
        shown = rows
        if fresh:
            lines.append(Line(cue.start, _round(cue.end - cue.start), _join(fresh)))
        elif rows and lines:
            lines[-1] = lines[-1]._replace(duration=_round(max(cue.end - lines[-1].start, lines[-1].duration)))
    return lines


def _overlap(shown: list[str], rows: list[str]) -> int:
    """So many rows have moved up: the last ones shown before are the first ones now."""
    return next((size for size in range(min(len(shown), len(rows)), 0, -1) if shown[-size:] == rows[:size]), 0)


def _spoken(rows: list[str]) -> list[str]:
    return [row for row in rows if row]


def _join(rows: list[str]) -> str:
    return " ".join(_spoken(rows))


def _round(seconds: float) -> float:
    """Times have milliseconds."""
    return max(0.0, round(seconds, 3))
