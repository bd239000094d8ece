"""Every choice of every group composes, and the defaults are the paper's."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf import UserError
from conf.composing import CONF_DIR, one_sentence
from data_pipelines.inspecting.settings import OF_THE_TRAINER
from tests.trainer.tiny_job import environment, overrides, run_command
from trainer.check import check
from trainer.config import PretrainConfig, compose_config, fill_vocabulary
from trainer.config_checks import doubtful, validate

GROUPS = ("model", "data", "objective", "optim", "parallel", "checkpoint", "monitor", "validation", "experiment")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted(Path(CONF_DIR, group).glob("*.yaml"))]
PROPORTIONS = {"laion": 128, "laion_coco": 128, "mmc4": 64, "webvid": 16, "storyboard": 16}
"""Batch sizes in the paper's table of corpora."""


@pytest.fixture(autouse=True)
def corpora_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_DATA", "/corpora")


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_can_be_run(group: str, choice: str) -> None:
    config = compose_config([f"{'+' * (group == 'experiment')}{group}={choice}"])
    config.init.vision_encoder = ""  # a file that the demo makes
    validate(config, dp_size=2)


def test_every_folder_of_choices_is_tried() -> None:
    assert {group for group, _ in CHOICES} == {path.parent.name for path in Path(CONF_DIR).glob("*/*.yaml")}


def test_defaults_are_the_papers() -> None:
    config = compose_config([])
    optim, data = config.optim, config.data
    assert (optim.vision_encoder_lr, optim.causal_transformer_lr, optim.language_model_lr) == (4e-5, 1e-4, 3e-5)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (0.9, 0.98, 1e-6, 0.05)
    assert (optim.schedule, optim.warmup_ratio, config.total_steps) == ("cosine", 0.2, 10_000)
    assert (config.objective.target_normalisation, config.objective.regression_gradient) == ("none", "full")
    assert {name: source.weight for name, source in data.sources.items()} == PROPORTIONS
    assert (data.seq_len, data.lanes) == (2048, 256)
    assert data.tokenizer == "/corpora/tokenizer/tokenizer.model"
    assert data.sources["storyboard"].shards == "/corpora/yt_storyboard/*.tar"
    assert data.sources["laion_coco"].options == {"caption": "json:top_caption"}


def test_a_dataclass_without_its_yaml_has_the_same_values() -> None:
    """Defaults stand in the dataclasses and, for the paper's groups, in a file too: they must not drift apart."""
    composed, plain = compose_config([]), PretrainConfig(run_dir="outputs/run")
    assert (composed.optim, composed.objective) == (plain.optim, plain.objective)
    assert (composed.checkpoint, composed.monitor, composed.init) == (plain.checkpoint, plain.monitor, plain.init)
    assert composed.validation == plain.validation


@pytest.mark.slow
def test_cfg_job_shows_every_key_without_corpora(tmp_path: Path) -> None:
    shown = run_command("trainer.pretrain", ["--cfg", "job"], tmp_path)
    assert shown.returncode == 0 and shown.stderr == ""
    tree = OmegaConf.create(shown.stdout)
    assert tree.keys() == {field.name for field in fields(PretrainConfig)}
    for group in set(GROUPS) & tree.keys():
        assert tree[group].keys() == {field.name for field in fields(getattr(PretrainConfig(), group))}, group


def test_a_command_line_is_checked_without_torch(tmp_path: Path) -> None:
    """As a launcher does on a login node."""
    code = "import sys, trainer.check as c; c.compose_config([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(EMU_DATA="/corpora"), cwd=tmp_path, check=False)
    assert done.returncode == 0


def test_the_vocabulary_is_the_tokenizers(corpora: Path, tokenizer_path: Path) -> None:
    config = compose_config(overrides(corpora, tokenizer_path, Path("run")))
    assert config.model.language_model.text_vocab_size == 0
    tokenizer = fill_vocabulary(config)
    assert config.model.language_model.text_vocab_size == tokenizer.text_vocab_size == 360
    config.model.language_model.text_vocab_size = 32000
    with pytest.raises(UserError, match=r"text_vocab_size=32000 but data.tokenizer=\S+ has 360 pieces"):
        fill_vocabulary(config)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("objective.target_normalisation=mean", "objective.target_normalisation=mean is not known: choose one of none"),
        ("objective.regression_gradient=half", "choose one of full, text_only"),
        ("optim.schedule=linear", "optim.schedule=linear is not known: choose one of cosine, constant"),
        ("parallel.precision=fp16", "parallel.precision=fp16 is not known: choose one of fp32, bf16"),
        ("checkpoint.resume=maybe", "choose one of auto, never"),
        ("monitor.wandb=on", "choose one of offline, online, disabled"),
        ("parallel.zero_stage=4", "parallel.zero_stage=4 is not a ZeRO stage: choose 0, 1, 2 or 3"),
        ("parallel.activation_checkpointing=some", "choose one of none, selective, full"),
        ("parallel.offload_optimizer=nvme", "choose one of none, cpu"),
        ("parallel.sequence=true", "parallel.sequence=true spreads positions over tensor-parallel ranks: set parallel"),
        (
            "parallel.offload_parameters=cpu",
            "needs parallel.zero_stage=3 or higher: set that, or offload_parameters=none",
        ),
        (
            "parallel.offload_optimizer=cpu parallel=zero0",
            "parallel.offload_optimizer=cpu needs parallel.zero_stage=1 or higher",
        ),
        (
            "parallel.sequence=true parallel.tensor=2 data.seq_len=1001",
            "data.seq_len=1001 is not a multiple of parallel.tensor=2, which parallel.sequence=true needs",
        ),
        ("parallel.tensor=3", "model.language_model.num_kv_heads=40 is not a multiple of parallel.tensor=3"),
        (
            "model.language_model.attention=flash",
            "attention=flash is not known: choose one of auto, sdpa, varlen, flash_",
        ),
        (
            "model.language_model.rope_scaling=yarn",
            "rope_scaling=yarn is not known: choose one of none, linear, llama3",
        ),
        (
            "init.weights=/nowhere",
            "init.weights=/nowhere is no folder of imported weights: make it with python -m models",
        ),
        (
            "parallel=zero0 parallel.precision=bf16 parallel.tensor=2",
            "parallel.zero_stage=0 does not clip gradients rightly with parallel.precision=bf16",
        ),
        (
            "parallel.tensor=8",
            "is not a multiple of parallel.tensor=8: model.language_model.num_special_tokens can be larger",
        ),
        (
            "data.sources.laion.shards=https://store/0.tar data.retry_minutes=4",
            "data.retry_minutes=4 is too long for guard.hang_minutes=10, which ends a step that waits for 3",
        ),
        ("total_steps=0", "total_steps=0 is too small: give at least 1"),
        ("checkpoint.keep=0", "checkpoint.keep=0 is too small: give at least 1"),
        ("optim.language_model_lr=-1", "optim.language_model_lr=-1.0 is too small: give at least 0"),
        ("monitor.log_every_steps=0", "monitor.log_every_steps=0 is too small: give at least 1"),
        ("validation.rows=0", "validation.rows=0 is too small: give at least 1"),
        ("validation.every_steps=-1", "validation.every_steps=-1 is too small: give at least 0"),
        ("validation.retrieval=1", "validation.retrieval=1 leaves nothing to choose from: give 0 or at least 2"),
        (
            "validation.sample_tokens=2040",
            "validation.sample_tokens=2040 and a picture do not fit into model.language_model.max_positions=2048",
        ),
        ("optim.warmup_ratio=1.5", "optim.warmup_ratio=1.5 is not a share: give a number from 0 to 1"),
        ("model.vision.patch_size=15", "model.vision.image_size=224 is not a multiple of model.vision.patch_size=15"),
        ("data.seq_len=4096", "data.seq_len=4096 is longer than model.language_model.max_positions=2048"),
        ("init.vision_encoder=/nowhere.pt", "init.vision_encoder=/nowhere.pt is not a file"),
        ("data.sources.laion.holdout=2", "data.sources.laion.holdout=2.0 must lie between 0 and 1"),
    ],
)
def test_impossible_values_are_refused(wrong: str, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        validate(compose_config(wrong.split()), dp_size=1)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    "accepted",
    [
        "parallel=zero1 parallel.precision=bf16 parallel.tensor=2",
        "data.retry_minutes=30",  # of local shards
        "data.sources.laion.shards=https://store/0.tar",
        "data.sources.laion.shards=https://store/0.tar data.retry_minutes=30 guard.hang_minutes=0",
        "data.sources.laion.shards=https://store/0.tar data.retry_minutes=30 data.sources.laion.weight=0",
    ],
)
def test_possible_values_are_not_refused(accepted: str) -> None:
    validate(compose_config(accepted.split()), dp_size=1)


def test_imported_weights_want_their_own_settings(tmp_path: Path) -> None:
    """Those of LLaMA 2 and 3 that no shape tells: with others the model would run, and be wrong."""
    language = {"width": 5120, "head_width": 128, "norm_eps": 1e-5, "rope_base": 5e5, "max_positions": 8192}
    description = {"format": 1, "prefixes": [], "fresh": [], "model": {"language_model": language}}
    (tmp_path / "weights.json").write_text(json.dumps(description))
    own = [f"init.weights={tmp_path}"]
    with pytest.raises(UserError) as refusal:
        validate(compose_config(own), dp_size=1)
    wanted = ["model.language_model.norm_eps=1e-05", "model.language_model.rope_base=500000.0"]
    assert str(refusal.value).endswith(f"with other settings: add {' '.join(wanted)}")
    validate(compose_config([*own, *wanted]), dp_size=1)


def test_inspection_leaves_out_what_is_not_of_the_data() -> None:
    """Its list of the others' settings is this configuration without data and model."""
    assert {*OF_THE_TRAINER, "data", "model"} == {field.name for field in fields(PretrainConfig)}


def test_what_is_hardly_meant_is_told() -> None:
    random_start, no_holdout = doubtful(compose_config([]))
    assert random_start.startswith("all weights start at random, and with objective.regression_gradient=full")
    assert no_holdout.startswith("validation.every_steps=1000 does nothing")
    meant = ["objective=from_scratch", "data.sources.laion.holdout=0.01"]
    assert doubtful(compose_config(meant)) == []
    assert doubtful(compose_config(["init.weights=x", "total_steps=999"])) == []


@pytest.mark.parametrize("tensor", [0, 2])
def test_processes_are_a_multiple_of_the_tensor_parallel_ranks(tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=f"3 processes are no multiple of parallel.tensor={tensor}"):
        check([f"parallel.tensor={tensor}"])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("data.sources.laion.kind=lion", "data.sources.laion.kind is 'lion': it must be one of pairs, laion"),
        ("+data.sources.laion.options.speed=1", "options.speed does not exist: the options of kind laion are caption"),
        ("+data.sources.laion.options.min_image_side=x", "options.min_image_side has a value of the wrong type"),
    ],
)
def test_options_of_sources_are_checked_before_any_process_starts(wrong: str, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        check([wrong])
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("data.lane=4", "Key 'lane' not in 'DataConfig' at data.lane: see all keys"),
        ("data.sources.mine.kind=pairs", "data.sources.mine does not exist yet: check its name, or put a + before it"),
        ("data.lanes=many", "Value 'many' of type 'str' could not be converted to Integer at data.lanes: see all keys"),
        ("model=emu_1t", "Could not find 'model/emu_1t' Available options in 'model': emu_14b emu_3b emu_7b emu_tiny"),
        ("seed", "missing EQUAL at '<EOF>': see all keys"),
    ],
)
def test_what_cannot_be_composed_is_one_sentence(wrong: str, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        compose_config([wrong])
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMU_DATA")
    with pytest.raises(UserError, match="environment variable EMU_DATA, which is not set: export EMU_DATA=FOLDER"):
        compose_config([])


def test_unknown_errors_keep_their_text() -> None:
    assert one_sentence(ValueError("first line\n    second line.")).startswith("first line second line: see all keys")
