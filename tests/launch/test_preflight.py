from __future__ import annotations

import io
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import sentencepiece
from packaging.requirements import Requirement

from conf import UserError
from data_pipelines.config import DataConfig, SourceConfig
from launch import preflight
from models.config import ModelConfig
from trainer import run_folder
from trainer.config import PretrainConfig


def write_shard(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("000.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))


def write_tokenizer(path: Path) -> None:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a red circle", "a blue square"]),
            model_writer=file,
            vocab_size=24,
            hard_vocab_limit=False,
            minloglevel=2,
        )


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """A small valid configuration on real files, which is what preflight composes."""
    write_shard(tmp_path / "0.tar")
    write_tokenizer(tmp_path / "tokenizer.model")
    data = DataConfig(
        sources={"pairs": SourceConfig(kind="pairs", shards=str(tmp_path / "*.tar"))},
        tokenizer=str(tmp_path / "tokenizer.model"),
        global_batch_rows=8,
        lanes=4,
    )
    config = PretrainConfig(run_dir=str(tmp_path / "run"), model=ModelConfig(name="small"), data=data)
    config.model.language_model.text_vocab_size = 0
    config.model.language_model.num_layers = config.model.vision.num_layers = 1
    config.checkpoint.keep = 1
    monkeypatch.setattr(preflight, "compose_config", lambda overrides: config)
    return config


def statuses(config: PretrainConfig, num_procs: int = 1) -> dict[str, str]:
    checks = preflight.run_checks(Path(config.run_dir), num_procs, [])
    assert all(bool(check.mend) is (check.status != "ok") for check in checks)
    return {check.name: check.status for check in checks}


def test_a_valid_job_passes_and_leaves_nothing_behind(config: PretrainConfig) -> None:
    assert "fail" not in {status for name, status in statuses(config).items() if name != "shared memory"}
    assert not Path(config.run_dir).exists()


def test_what_is_missing_or_impossible_fails(config: PretrainConfig, tmp_path: Path) -> None:
    config.data.sources["gone"] = SourceConfig(kind="pairs", shards=str(tmp_path / "gone-*.tar"))
    config.data.tokenizer = str(tmp_path / "gone.model")
    found = statuses(config, num_procs=3)
    assert found["source pairs"] == "ok"
    assert found["source gone"] == "fail"
    assert found["tokenizer"] == "fail"
    assert found["configuration"] == "fail"  # 4 lanes cannot be shared by 3 ranks


def test_sources_that_are_left_out_are_not_looked_for(config: PretrainConfig, tmp_path: Path) -> None:
    config.data.sources["gone"] = SourceConfig(kind="pairs", shards=str(tmp_path / "gone-*.tar"), weight=0.0)
    assert "source gone" not in statuses(config)


def test_a_missing_index_is_told_with_the_command_that_makes_it(config: PretrainConfig, tmp_path: Path) -> None:
    config.data.index_dir = str(tmp_path / "index")
    checks = {check.name: check for check in preflight.run_checks(Path(config.run_dir), 1, [])}
    found = checks["index pairs"]
    assert found.status == "warn"
    command = shlex.split(found.mend)
    assert command[:3] == ["python", "-m", "data_pipelines.prepare.index"]
    done = subprocess.run([sys.executable, *command[1:]], cwd=Path(preflight.__file__).parents[1], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert statuses(config)["index pairs"] == "ok"


def test_commands_can_be_copied(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.data.index_dir = str(tmp_path / "a folder with a name that is much longer than a column of the table")
    monkeypatch.setattr(sys, "argv", ["preflight", "--run-dir", config.run_dir])
    preflight.main()
    checks = preflight.run_checks(Path(config.run_dir), 1, [])
    [command] = [check.mend for check in checks if check.name == "index pairs"]
    assert command in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("command", "status"), [("nvidia-smi", "fail"), ("other", "warn")])
def test_host_memory_holds_the_copy_of_a_checkpoint(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, status: str
) -> None:
    """A node without a GPU is not the one that it will run on."""
    write_executable(tmp_path / command, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    config.model.language_model.num_layers = 100_000
    check = preflight.check_host_memory(config, nodes=1)
    assert check.status == status and "use more nodes" in check.mend
    assert preflight.check_host_memory(config, nodes=10**6).status == "ok"


@pytest.mark.parametrize(("num_procs", "nodes", "status"), [(8, 1, "ok"), (16, 1, "fail"), (16, 2, "ok")])
def test_gpus_are_counted_on_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_procs: int, nodes: int, status: str
) -> None:
    listing = "\n".join(f"GPU {number}: NVIDIA H100 (UUID: x)" for number in range(8))
    write_executable(tmp_path / "nvidia-smi", f"echo '{listing}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    checks = {check.name: check for check in preflight.run_checks(tmp_path / "run", num_procs, ["data.lane=1"], nodes)}
    assert checks["GPUs"].status == status


def write_executable(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_run_folder_in_use_fails(config: PretrainConfig) -> None:
    lock = run_folder.claim(Path(config.run_dir))
    assert statuses(config)["run folder"] == "fail"
    lock.close()
    assert statuses(config)["run folder"] == "ok"


def test_configuration_that_cannot_be_composed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(overrides: list[str]) -> PretrainConfig:
        raise UserError("no key data.lane: see all keys")

    monkeypatch.setattr(preflight, "compose_config", refuse)
    checks = preflight.run_checks(tmp_path, 1, ["data.lane=1"])
    assert (checks[-1].name, checks[-1].status) == ("configuration", "fail")
    assert "data.lane" in checks[-1].detail


def test_disk_counts_twelve_bytes_a_parameter_and_the_checkpoint_being_written(config: PretrainConfig) -> None:
    config.checkpoint.keep = 10**9
    check = preflight.check_disk(config)
    assert check.status == "fail"
    assert "checkpoint.keep" in check.mend


def test_package_versions() -> None:
    assert preflight.version_problem(Requirement("pytest>=1")) == ""
    assert "is not <1" in preflight.version_problem(Requirement("pytest<1"))
    assert preflight.version_problem(Requirement("no-such-distribution")) == "no-such-distribution is missing"


def test_shared_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 64e6})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)
    assert preflight.check_shared_memory(tmp_path).status == "fail"
