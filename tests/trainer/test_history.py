"""Numbers of a run by metric and step: attempts, cut lines, and reading on while the file grows."""

from __future__ import annotations

import json
from pathlib import Path

from tests.trainer.made_run import write_lines
from trainer.monitor import read_metrics
from trainer.reporting.history import FIRST_CAPACITY, History


def test_the_later_attempt_counts_as_everywhere(tmp_path: Path) -> None:
    """The same rule as `read_metrics`; of a step that is written again nothing of the line before stays."""
    path = tmp_path / "metrics.jsonl"
    write_lines(
        path, [{"attempt": 1, "step": n, "loss": n, "loss/laion": n} for n in range(1, 9)], '\n{"attempt": 1,\n'
    )
    write_lines(path, [{"attempt": 2, "step": n, "loss": 10 * n} for n in range(5, 8)])
    write_lines(path, [{"attempt": 1, "step": 6, "loss": -1}])
    history = History(path)
    history.read_new()
    records = read_metrics(tmp_path)
    for name in ("loss", "loss/laion"):
        kept = [(record["step"], record[name]) for record in records if name in record]
        assert list(zip(*map(list, history.curve(name)), strict=True)) == kept


def test_reading_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    history.read_new()
    assert history.step is None
    line = json.dumps({"attempt": 1, "step": 2, "loss": 2.0})
    path.write_text(json.dumps({"attempt": 1, "step": 1, "loss": 1.0}) + "\n" + line[:-4])
    history.read_new()
    assert history.step == 1
    with path.open("a") as file:
        file.write(line[-4:] + "\n")
    history.read_new()
    assert history.step == 2 and list(history.curve("loss")[1]) == [1.0, 2.0]


def test_lines_that_are_no_steps_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[1]\n{"loss": 1}\n\x00\xff\n{"attempt": 1, "step": 3, "loss": NaN, "rank": null, "list": [1]}\n')
    history = History(path)
    history.read_new()
    assert (
        history.step == 3 and history.names("rank") == history.names("list") == [] and not len(history.curve("loss")[0])
    )


def test_columns_grow(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [1, FIRST_CAPACITY, 10 * FIRST_CAPACITY]
    write_lines(path, [{"attempt": 1, "step": step, "loss": step} for step in steps])
    history = History(path)
    history.read_new()
    assert list(history.curve("loss")[0]) == list(history.curve("loss")[1]) == steps


def test_counts_of_the_newest_line_and_their_curves(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"attempt": 1, "step": n, "samples": {"laion": 10 * n}} for n in (1, 2)])
    history = History(path)
    history.read_new()
    assert history.latest["samples"] == {"laion": 20}
    assert list(history.curve("samples/laion")[1]) == [10.0, 20.0]


def test_the_pace_is_of_the_newest_attempt(tmp_path: Path) -> None:
    """100 s between the attempts do not count; a step done again after a rollback does."""
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"attempt": 1, "step": n, "time": 1000.0 + 5 * n} for n in (1, 2, 3)])
    write_lines(path, [{"attempt": 2, "step": n, "time": t} for n, t in ((3, 1115.0), (4, 1117.0), (3, 1119.0))])
    history = History(path)
    history.read_new()
    assert (history.seconds_per_step(), history.step, history.last_time) == (2.0, 3, 1119.0)
