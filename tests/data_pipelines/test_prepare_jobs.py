"""What all preparing commands promise: same bytes however they were run, whole shards only, nothing made twice."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from conf import UserError
from data_pipelines.index_builder import build_index
from data_pipelines.prepare import mmc4, webvid
from tests.data_pipelines.prepare_helpers import COMMANDS, files_of, run, run_killed, stats_of, write_mmc4, write_webvid
from tests.data_pipelines.sources_helpers import read_samples


class Prepared(NamedTuple):
    """A command, its input, and what one run over all of it has made."""

    module: ModuleType
    arguments: list[Any]
    files: dict[str, bytes]


@pytest.fixture(params=COMMANDS)
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Prepared:
    module, write = COMMANDS[request.param]
    arguments = write(tmp_path / "input")
    run(module, *arguments, "--out", tmp_path / "whole")
    files = files_of(tmp_path / "whole")
    assert sum(name.endswith(".tar") for name in files) >= 4
    return Prepared(module, arguments, files)


@pytest.mark.parametrize(
    ("where", "number"), [("before", 1), ("before", 4), ("after", 2), ("after", 5), ("addfile", 1), ("addfile", 6)]
)
def test_a_killed_run_goes_on_to_the_same_bytes(prepared: Prepared, tmp_path: Path, where: str, number: int) -> None:
    out = tmp_path / "out"
    run_killed(where, number, prepared.module, *prepared.arguments, "--out", out)
    left = files_of(out)
    assert left.items() <= prepared.files.items() and left != prepared.files
    run(prepared.module, *prepared.arguments, "--out", out)
    assert files_of(out) == prepared.files


def test_three_tasks_make_what_one_makes(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made: list[set[str]] = []
    for task in (2, 0, 1):
        before = set(files_of(out)) if out.exists() else set()
        run(prepared.module, *prepared.arguments, "--out", out, "--task-id", task, "--num-tasks", 3)
        made.append({name for name in set(files_of(out)) - before if name.endswith("_stats.json")})
    assert all(made)
    assert files_of(out) == prepared.files


def test_finished_shards_are_not_made_again(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "whole"
    lost = sorted(out.glob("*.tar"))[1]
    lost.unlink()
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    run(prepared.module, *prepared.arguments, "--out", out)
    touched = {path.name for path in out.iterdir() if times.get(path.name) != path.stat().st_mtime_ns}
    assert touched == {lost.name, f"{lost.stem}_stats.json"}
    assert files_of(out) == prepared.files


def test_a_shard_that_was_cut_is_made_again(prepared: Prepared, tmp_path: Path) -> None:
    cut = sorted((tmp_path / "whole").glob("*.tar"))[0]
    cut.write_bytes(cut.read_bytes()[:700])
    run(prepared.module, *prepared.arguments, "--out", tmp_path / "whole")
    assert files_of(tmp_path / "whole") == prepared.files


def test_other_settings_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"made with samples_per_shard=[34] and not 5"):
        run(prepared.module, *prepared.arguments, "--samples-per-shard", 5, "--out", tmp_path / "whole")
    assert files_of(tmp_path / "whole") == prepared.files


def test_the_index_takes_every_sample(prepared: Prepared, tmp_path: Path) -> None:
    index = build_index("corpus", str(tmp_path / "whole" / "*.tar"), tmp_path / "index")
    samples = [sample for path in sorted((tmp_path / "whole").glob("*.tar")) for sample in read_samples(path)]
    assert index.num_samples == len(samples) == stats_of(tmp_path / "whole")["success"]
    assert index.num_defects == index.num_disagreements == 0 and not any(sample.defect for sample in samples)


def test_changed_input_is_refused(tmp_path: Path) -> None:
    arguments = write_webvid(tmp_path)
    run(webvid, *arguments, "--out", tmp_path / "out")
    with (tmp_path / "results.csv").open("a") as table:
        table.write("500,new,1,x,PT00H00M03S,http://v.example/x.mp4\r\n")
    with pytest.raises(UserError, match="made from other input"):
        run(webvid, *arguments, "--out", tmp_path / "out")


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="did not make"):
        run(webvid, *write_webvid(tmp_path), "--out", tmp_path / "out")


@pytest.mark.parametrize("wrong", [("--task-id", 3), ("--task-id", -1), ("--num-tasks", 0), ("--samples-per-shard", 0)])
def test_wrong_numbers(tmp_path: Path, wrong: tuple[str, int]) -> None:
    with pytest.raises(UserError, match=wrong[0]):
        run(webvid, *write_webvid(tmp_path), "--out", tmp_path / "out", "--num-tasks", 3, *wrong)


def test_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_mmc4(tmp_path / name)
    pattern = f"{tmp_path}/*/docs_*.jsonl.zip"
    with pytest.raises(UserError, match="several inputs"):
        run(mmc4, pattern, "--images", tmp_path / "a" / "images", "--out", tmp_path / "out")


def test_the_end_says_what_was_made_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(webvid, *write_webvid(tmp_path), "--out", tmp_path / "out", "--task-id", 1, "--num-tasks", 2)
    printed = capsys.readouterr().out
    assert "left out: video missing" in printed and "task 1 of 2" in printed
    assert "2 shards made, 0 were there already" in printed
    assert f"next (when all 2 tasks have ended): python -m data_pipelines.prepare.index webvid '{tmp_path}" in printed


def test_nothing_usable_is_an_error_after_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = write_webvid(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of the rows could be used"):
        run(webvid, *arguments, "--videos", tmp_path / "empty", "--out", tmp_path / "out")
    assert "left out: video missing" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.tar"))
