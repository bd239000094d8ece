"""The configuration of a pretraining job: what Hydra composes from `conf/`, typed (trainer/config_checks.py checks it).

No torch here: launchers compose configurations on login nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from conf import UserError
from conf.composing import compose_object
from data_pipelines.config import DataConfig
from data_pipelines.tokenizer import Tokenizer
from models.config import ModelConfig, ObjectiveConfig

MAX_BUCKET = 500_000_000
"""Gradients that ZeRO reduces at a time, at most."""


@dataclass
class OptimConfig:
    """AdamW as in the paper: peak learning rate per module, cosine decay after a linear warm-up.

    schedule: cosine | constant (no decay and no warm-up). warmup_ratio: share of total_steps. min_lr_ratio: where the
    cosine ends. grad_clip: largest global gradient norm (Emu2's value; Emu does not state one). Norms, biases, queries
    and position tables are not decayed.
    """

    vision_encoder_lr: float = 4e-5
    causal_transformer_lr: float = 1e-4
    language_model_lr: float = 3e-5
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.05
    grad_clip: float = 5.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.2
    min_lr_ratio: float = 0.0


@dataclass
class ParallelConfig:
    """zero_stage: DeepSpeed ZeRO 0-3 over the data-parallel ranks. precision: fp32 | bf16 (with fp32 master weights;
    gradients are summed over micro-batches and ranks in bf16, as DeepSpeed does by itself).

    tensor: ranks that share every layer of the language model (tensor parallel) and the images of their rows; they are
    neighbours. sequence: between the layers they also share the positions (saves activations; CUDA only).
    activation_checkpointing: none | selective | full, what is computed again in backward (models/recompute.py).
    offload_optimizer: none | cpu, where Adam's state and step are. offload_parameters: none | cpu, where ZeRO-3 keeps
    weights that are not in use.

    persistence_threshold: ZeRO-3 keeps smaller parameters whole on every rank. timeout_minutes: a collective that takes
    longer ends the run. threads: CPU threads of a rank, 0 = leave as it is. deterministic: refuse operations whose
    result depends on thread timing; on CUDA, where not all have another form, warn of them.
    """

    zero_stage: int = 2
    tensor: int = 1
    sequence: bool = False
    activation_checkpointing: str = "none"
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    precision: str = "fp32"
    persistence_threshold: int = 100_000
    timeout_minutes: float = 30.0
    threads: int = 0
    deterministic: bool = False


@dataclass
class CheckpointConfig:
    """every_steps, permanent_every_steps: 0 = never (a run that ends always leaves one). keep: rolling ones kept.
    background: training goes on while the files are written; false = the step waits.

    resume: auto = from the newest whole checkpoint of the run folder | never = start anew; a folder with checkpoints is
    refused.
    allow_changes: resume although the data order's fingerprint differs.
    """

    every_steps: int = 500
    keep: int = 2
    permanent_every_steps: int = 0
    background: bool = True
    resume: str = "auto"
    allow_changes: bool = False


@dataclass
class GuardConfig:
    """What a run does about steps that must not count, and about ranks that stand still (trainer/guards.py).

    A step whose loss or gradient is not a number is thrown away. So is one whose text loss is spike_deviations standard
    deviations, and spike_share of the mean, above the mean of about the last history_steps; spike_deviations=0: never.
    patience: after so many in a row the run takes the weights of the last checkpoint before them and passes over the
    data since. max_rollbacks: of those within 100 steps, before the run gives up.
    hang_minutes: a step, or what comes between two, that takes longer ends the run with every rank's stack written
    down, 0 = never; a rollback, and what comes before the first step and after the last, have
    parallel.timeout_minutes.
    """

    spike_deviations: float = 8.0
    spike_share: float = 0.5
    history_steps: int = 100
    patience: int = 3
    max_rollbacks: int = 3
    hang_minutes: float = 10.0


@dataclass
class MonitorConfig:
    """log_every_steps: console and wandb. wandb: offline | online | disabled.

    profile_step: a profile of this step is written into the run folder, 0 = none; USR2 to a rank asks for one too.

    collapse_spread: alarm when the visual embeddings' standard deviation across images falls below this share of their
    root mean square.
    """

    log_every_steps: int = 10
    wandb: str = "offline"
    wandb_project: str = "emu"
    collapse_spread: float = 0.02
    profile_step: int = 0


@dataclass
class ValidationConfig:
    """On the documents that data.sources.*.holdout keeps from training; a source that keeps none takes no part.

    every_steps: 0 = never. rows: packed rows a source, at most. retrieval: pictures among which that of a text is
    looked for, at most; 0 = off. samples: pictures of which captions are generated and kept; 0 = off. sample_tokens:
    length of such a caption, at most.
    """

    every_steps: int = 1000
    rows: int = 8
    retrieval: int = 32
    samples: int = 4
    sample_tokens: int = 32


@dataclass
class InitConfig:
    """Where weights start; "" = at random.

    weights: folder that models.weights.import_ made; what it does not hold starts at random.
    vision_encoder: file in EVA-CLIP's layout (.safetensors or .pt).
    """

    weights: str = ""
    vision_encoder: str = ""


@dataclass
class PretrainConfig:
    """run_dir: what the run writes. total_steps: length of the schedule. stop_after_step: end early, 0 = do not.

    stop_after_minutes: since the start of this attempt; then as after a signal, 0 = do not.
    """

    run_dir: str = MISSING
    total_steps: int = 10_000
    stop_after_step: int = 0
    stop_after_minutes: float = 0.0
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    init: InitConfig = field(default_factory=InitConfig)


def register_schemas() -> None:
    """Make the dataclasses known to Hydra as the types of the YAML groups."""
    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)


def compose_config(overrides: list[str], name: str = "pretrain") -> PretrainConfig:
    """Compose `conf/<name>.yaml` with command-line overrides. UserError on an unknown key or a wrong type."""
    register_schemas()
    config = compose_object(name, overrides)
    assert isinstance(config, PretrainConfig)
    return config


def to_dataclass(composed: Any) -> PretrainConfig:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, PretrainConfig)
    return config


def fill_vocabulary(config: PretrainConfig) -> Tokenizer:
    """Open the tokenizer and settle model.language_model.text_vocab_size with it. UserError if they disagree."""
    tokenizer = Tokenizer(config.data.tokenizer)
    language = config.model.language_model
    if language.text_vocab_size == 0:
        language.text_vocab_size = tokenizer.text_vocab_size
    if language.text_vocab_size != tokenizer.text_vocab_size:
        raise UserError(
            f"model.language_model.text_vocab_size={language.text_vocab_size} but data.tokenizer="
            f"{config.data.tokenizer} has {tokenizer.text_vocab_size} pieces: give the model's own, or 0 to take "
            "the tokenizer's size"
        )
    return tokenizer
