"""Wrong input ends in one sentence on stderr that names the file or key and the mend: exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.data_pipelines.corpora import write_pairs
from tests.distributed.harness import run_distributed
from tests.trainer.tiny_job import environment, finish, overrides, run_command, start_ranks, write_corpora


def sentence_of(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    return only_sentence(printed.err)


def only_sentence(stderr: str) -> str:
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert "Traceback" not in stderr
    return stderr.removeprefix("error: ").rstrip("\n")


EARLY = [
    # (what is wrong, ranks, the sentence): refused before any process group exists
    ("data.lane=4", 1, "Key 'lane' not in 'DataConfig' at data.lane: see all keys"),
    ("optim.betas=3", 1, "Key 'betas' not in 'OptimConfig' at optim.betas: see all keys"),
    (
        "total_steps=many",
        1,
        "Value 'many' of type 'str' could not be converted to Integer at total_steps: see all keys",
    ),
    ("data.sources.laion.weight=much", 1, "could not be converted to Float at data.sources.laion.weight: see all keys"),
    ("data.seq_len=7", 1, "data.seq_len=7 is too small for one image of 3 embeddings and a word: make it at least 8"),
    (
        "data.lanes=5",
        2,
        "data.lanes=5 cannot be shared by 2 data-parallel ranks: make it a multiple of 2, or, in a run that",
    ),
    ("data.lanes=3", 1, "data.global_batch_rows=8 is no multiple of data.lanes=3: every lane gives the same number"),
    ("data.micro_batch_rows=8", 2, "data.micro_batch_rows=8 does not divide the 4 rows of a rank"),
    (
        "data.tokenizer=/nowhere.model",
        1,
        "the tokenizer /nowhere.model cannot be read (No such file or directory): set",
    ),
    ("model.language_model.text_vocab_size=32000", 1, "has 360 pieces: give the model's own, or 0 to take"),
    (
        "init.vision_encoder=/nowhere.pt",
        1,
        "init.vision_encoder=/nowhere.pt is not a file: give an EVA-CLIP",
    ),
]


@pytest.mark.parametrize(("wrong", "ranks", "expected"), EARLY)
def test_a_wrong_key_or_combination(
    corpora: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: str,
    ranks: int,
    expected: str,
) -> None:
    from conf import run_cli
    from trainer import pretrain

    monkeypatch.setenv("EMU_DATA", str(corpora))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(pretrain, "SPEAKING_S", 0)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *overrides(corpora, tokenizer_path, tmp_path / "run", wrong)])
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as exit_:
            run_cli(pretrain.main)
        assert exit_.value.code == 2
        if rank == 0:
            assert expected in sentence_of(capsys)
        else:
            assert capsys.readouterr() == ("", "")  # all ranks find the same: one of them says it
    assert not (tmp_path / "run").exists()


def test_corpora_without_emu_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from conf import run_cli
    from trainer import pretrain

    monkeypatch.delenv("EMU_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "model=emu_tiny", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as exit_:
        run_cli(pretrain.main)
    assert exit_.value.code == 2
    assert sentence_of(capsys) == (
        "data.sources.laion.shards needs the environment variable EMU_DATA, which is not set: export EMU_DATA=FOLDER, "
        "or override data.sources.laion.shards"
    )


@pytest.mark.slow
def test_the_real_command_line(corpora: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    wrong = overrides(corpora, tokenizer_path, tmp_path / "run", "data.lanez=4")
    done = run_command("trainer.pretrain", wrong, tmp_path, EMU_DATA=str(corpora))
    assert done.returncode == 2 and done.stdout == ""
    assert "at data.lanez" in only_sentence(done.stderr)


LATE = {
    # found by the job itself, once its processes stand; {folder} is the corpus, {run} the run folder
    "a shard that is gone": "the shard {folder}/laion/00001.tar cannot be read (No such file or directory): restore it",
    "no shard at all": "no shard matches '{folder}/nothing/*.tar': check the path",
    "an index older than its shard": "is older than its shard {folder}/laion/00000.tar: run python -m data_pipelines",
    "a checkpoint of another model": (
        "{run}/checkpoints/step-00000002 is a checkpoint of another model (causal_transformer.blocks"
    ),
    "a folder in use": "run_dir={run} is in use by process {pid} on ",
    "a used folder and resume=never": (
        "run_dir={run} has checkpoints and checkpoint.resume=never: choose another folder, or checkpoint.resume=auto"
    ),
    "another data order": (
        "{run}/checkpoints/step-00000002 was written with another data order (data.seed was 0 and is 1): restore these "
        "settings, choose another run_dir, or set checkpoint.allow_changes=true"
    ),
    "an unknown kind of source": "data.sources.laion.kind is 'laoin': it must be one of pairs, laion, mmc4",
    "an unknown option of a source": "data.sources.laion.options.min_sim does not exist: the options of kind laion are",
    "corpora without a document": "the source 'laion' gave no document in",
    "a gradient that is not finite": "steps 3 to 3 were no good, and the rollbacks that guard.max_rollbacks=0 allows",
}

THROWN_AWAY = "step 3 was thrown away: gradient is not a number\n"


def run_wrong_jobs(folder: Path, tokenizer: Path, run: Path, world_size: int) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of this rank for every job of LATE. One group of processes runs them all."""
    import torch.distributed as dist

    from conf import run_cli
    from trainer import pretrain, run_folder
    from trainer.config import ParallelConfig, compose_config

    os.environ.update(environment(EMU_DATA=str(folder)))
    topology = pretrain.init_distributed(ParallelConfig(timeout_minutes=1))
    pretrain.init_distributed = lambda _: topology
    found: dict[str, tuple[int, str]] = {}

    def job(*more: str, run_dir: Path = run) -> tuple[int, str]:
        arguments = overrides(folder, tokenizer, run_dir, "total_steps=4", "objective=from_scratch", *more)
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit_:
            run_cli(lambda: pretrain.train(compose_config(arguments)))
        run_folder.release()
        dist.barrier()
        return exit_.value.code or 0, stderr.getvalue()  # type: ignore[return-value]

    assert job("stop_after_step=2") == (0, "")
    found["a checkpoint of another model"] = job("model.causal_transformer.num_layers=1")
    found["a used folder and resume=never"] = job("checkpoint.resume=never")
    found["another data order"] = job("data.seed=1")
    if topology.rank == 0:
        lock = run_folder.claim(run)
    dist.barrier()
    found["a folder in use"] = job()
    if topology.rank == 0:
        lock.close()
    found["a gradient that is not finite"] = job(
        "objective.text_weight=nan", "guard.patience=1", "guard.max_rollbacks=0"
    )
    new = run.with_name("new")
    found["no shard at all"] = job(f"data.sources.laion.shards={folder}/nothing/*.tar", run_dir=new)
    found["an unknown kind of source"] = job("data.sources.laion.kind=laoin", run_dir=new)
    found["an unknown option of a source"] = job("+data.sources.laion.options.min_sim=3", run_dir=new)
    found["corpora without a document"] = job("+data.sources.laion.options.min_similarity=0.3", run_dir=new)
    if topology.rank == 0:
        shutil.move(folder / "laion" / "00001.tar", folder / "kept.tar")
    dist.barrier()
    found["a shard that is gone"] = job(run_dir=new)
    if topology.rank == 0:
        shutil.move(folder / "kept.tar", folder / "laion" / "00001.tar")
        write_pairs(folder / "laion" / "00000.tar", 0, 29)
    dist.barrier()
    found["an index older than its shard"] = job(run_dir=new)
    return found


FAILING_RANK = """
import os, sys
from conf import UserError, run_cli
from trainer import pretrain, step

def fetch(stream, number, fetch=step.fetch):
    fetch.count = getattr(fetch, "count", 0) + 1
    if os.environ["RANK"] == "1" and fetch.count == 3:
        raise UserError("the shard of rank 1 cannot be read: restore it")
    return fetch(stream, number)

step.fetch = fetch
run_cli(pretrain.main)
"""


@pytest.mark.slow
def test_one_rank_alone_finds_something(corpora: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """The other one, left alone in a collective, does not add a traceback."""
    (tmp_path / "job.py").write_text(FAILING_RANK)
    arguments = overrides(corpora, tokenizer_path, tmp_path / "run", "parallel.zero_stage=3")
    ranks = start_ranks(2, arguments, corpora, [str(tmp_path / "job.py")])
    ended = finish(ranks)
    assert [code for code, _ in ended] == [2, 2], ended
    assert ended[1][1].endswith("error: the shard of rank 1 cannot be read: restore it\n")
    assert "rank 1" not in ended[0][1] and "Traceback" not in "".join(output for _, output in ended)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def late(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path
) -> tuple[Path, list[dict[str, tuple[int, str]]]]:
    folder = tmp_path_factory.mktemp("late")
    write_corpora(folder / "data")
    arguments = (folder / "data", tokenizer_path, folder / "run", request.param)
    return folder, run_distributed(run_wrong_jobs, request.param, *arguments, init_group=False)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", LATE)
def test_what_the_job_finds(late: tuple[Path, list[dict[str, tuple[int, str]]]], wrong: str) -> None:
    folder, by_rank = late
    codes = [of_rank[wrong][0] for of_rank in by_rank]
    said = [text for of_rank in by_rank if (text := of_rank[wrong][1].removeprefix(THROWN_AWAY))]
    assert codes == [2] * len(by_rank)
    places = {"folder": folder / "data", "run": folder / "run", "pid": ""}
    expected = LATE[wrong].format(**places).removesuffix(" on ")
    assert len(said) == 1, said
    assert expected in only_sentence(said[0])
