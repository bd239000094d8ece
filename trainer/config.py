"""The configuration of a pretraining job: what Hydra composes from `conf/`, typed and checked before anything starts.

No torch here: launchers compose configurations on login nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from conf import UserError
from conf.composing import compose_object
from data_pipelines.config import DataConfig
from data_pipelines.stores import is_local
from data_pipelines.tokenizer import Tokenizer
from data_pipelines.validate import validate_batching
from models.config import ModelConfig, ObjectiveConfig
from models.weights.description import read_description

MAX_BUCKET = 500_000_000
"""Gradients that ZeRO reduces at a time, at most."""
RETRIES_IN_A_STEP = 3
LEAST = {
    "total_steps": 1,
    "stop_after_step": 0,
    "optim.vision_encoder_lr": 0,
    "optim.causal_transformer_lr": 0,
    "optim.language_model_lr": 0,
    "optim.weight_decay": 0,
    "optim.grad_clip": 0,
    "parallel.threads": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.permanent_every_steps": 0,
    "checkpoint.keep": 1,
    "monitor.log_every_steps": 1,
    "monitor.profile_step": 0,
    "guard.spike_deviations": 0,
    "guard.spike_share": 0,
    "guard.history_steps": 2,
    "guard.patience": 1,
    "guard.max_rollbacks": 0,
    "guard.hang_minutes": 0,
    "stop_after_minutes": 0,
    "validation.every_steps": 0,
    "validation.rows": 1,
    "validation.retrieval": 0,
    "validation.samples": 0,
    "validation.sample_tokens": 1,
}
SHARES = ("optim.beta1", "optim.beta2", "optim.warmup_ratio", "optim.min_lr_ratio")


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


def choose(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value} is not known: choose one of {', '.join(allowed)}")


def validate(config: PretrainConfig, dp_size: int) -> None:
    """Refuse impossible combinations, one sentence each, before any process or model exists."""
    choose("objective.target_normalisation", config.objective.target_normalisation, ("none", "variance"))
    choose("objective.regression_gradient", config.objective.regression_gradient, ("full", "text_only"))
    choose("optim.schedule", config.optim.schedule, ("cosine", "constant"))
    choose("model.language_model.rope_scaling", config.model.language_model.rope_scaling, ("none", "linear", "llama3"))
    choose(
        "model.language_model.attention",
        config.model.language_model.attention,
        ("auto", "sdpa", "varlen", "flash_attn"),
    )
    choose("checkpoint.resume", config.checkpoint.resume, ("auto", "never"))
    choose("monitor.wandb", config.monitor.wandb, ("offline", "online", "disabled"))
    validate_parallel(config)
    for key, least in LEAST.items():
        if (value := attrgetter(key)(config)) < least:
            raise UserError(f"{key}={value} is too small: give at least {least}")
    for key in SHARES:
        if not 0 <= (value := attrgetter(key)(config)) <= 1:
            raise UserError(f"{key}={value} is not a share: give a number from 0 to 1")
    validate_model(config.model, config.parallel.tensor)
    if config.data.seq_len > config.model.language_model.max_positions:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is longer than model.language_model.max_positions="
            f"{config.model.language_model.max_positions}: shorten the one or raise the other"
        )
    if config.init.vision_encoder and not Path(config.init.vision_encoder).is_file():
        raise UserError(f"init.vision_encoder={config.init.vision_encoder} is not a file: give an EVA-CLIP checkpoint")
    if config.init.weights and not Path(config.init.weights, "weights.json").is_file():
        raise UserError(
            f"init.weights={config.init.weights} is no folder of imported weights: make it with python -m "
            "models.weights.import_"
        )
    if config.init.weights:
        validate_imported(config)
    validate_stores(config)
    validate_batching(config.data, dp_size, config.model.causal_transformer.num_queries)
    validate_validation(config)


def doubtful(config: PretrainConfig) -> list[str]:
    """What can be run and is hardly meant, one sentence each."""
    sentences = []
    if config.objective.regression_gradient == "full" and not (config.init.weights or config.init.vision_encoder):
        sentences.append(
            "all weights start at random, and with objective.regression_gradient=full the visual embeddings then "
            "collapse: give init.weights, or take objective=from_scratch"
        )
    validates = 0 < config.validation.every_steps <= config.total_steps
    if validates and not any(source.holdout for source in config.data.sources.values()):
        sentences.append(
            f"validation.every_steps={config.validation.every_steps} does nothing, for no source keeps documents for "
            "it: set data.sources.NAME.holdout (which a run that has begun cannot), or validation.every_steps=0"
        )
    return sentences


def validate_imported(config: PretrainConfig) -> None:
    """Settings that the imported weights were made for: most of them, as RoPE's or a norm's, no shape would tell."""
    needed = []
    for section, values in read_description(Path(config.init.weights)).get("model", {}).items():
        for name, value in values.items():
            own = getattr(getattr(config.model, section, None), name, None)
            if name == "head_width" and not own:
                own = config.model.language_model.width_of_head
            if own is not None and name not in ("max_positions", "text_vocab_size") and own != value:
                needed.append(f"model.{section}.{name}={value}")
    if needed:
        raise UserError(
            f"init.weights={config.init.weights} holds weights of a model with other settings: add {' '.join(needed)}"
        )


def validate_stores(config: PretrainConfig) -> None:
    """The watchdog would end a run while it waits for a store that it may wait for."""
    hang, retry = config.guard.hang_minutes, config.data.retry_minutes
    is_remote = any(not is_local(source.shards) for source in config.data.sources.values() if source.weight > 0)
    if is_remote and hang and RETRIES_IN_A_STEP * retry > hang:
        raise UserError(
            f"data.retry_minutes={retry:g} is too long for guard.hang_minutes={hang:g}, which ends a step that waits "
            f"for {RETRIES_IN_A_STEP} unreachable chunks of a store: give at most {hang / RETRIES_IN_A_STEP:g}, or "
            "more hang_minutes"
        )


def validate_validation(config: PretrainConfig) -> None:
    """A retrieval among one, and captions longer than the model's texts."""
    validation = config.validation
    if validation.retrieval == 1:
        raise UserError("validation.retrieval=1 leaves nothing to choose from: give 0 or at least 2")
    room = config.model.language_model.max_positions - config.model.causal_transformer.num_queries - 3
    if validation.samples and validation.sample_tokens > room:
        raise UserError(
            f"validation.sample_tokens={validation.sample_tokens} and a picture do not fit into "
            f"model.language_model.max_positions={config.model.language_model.max_positions}: give at most {room}"
        )


def validate_parallel(config: PretrainConfig) -> None:
    parallel = config.parallel
    choose("parallel.precision", parallel.precision, ("fp32", "bf16"))
    choose("parallel.activation_checkpointing", parallel.activation_checkpointing, ("none", "selective", "full"))
    choose("parallel.offload_optimizer", parallel.offload_optimizer, ("none", "cpu"))
    choose("parallel.offload_parameters", parallel.offload_parameters, ("none", "cpu"))
    if parallel.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"parallel.zero_stage={parallel.zero_stage} is not a ZeRO stage: choose 0, 1, 2 or 3")
    if parallel.zero_stage == 0 and parallel.precision == "bf16" and parallel.tensor > 1:
        raise UserError(  # DeepSpeed's optimizer for it takes only the first rank's shards into the gradient norm
            "parallel.zero_stage=0 does not clip gradients rightly with parallel.precision=bf16 and parallel.tensor "
            "> 1: set parallel.zero_stage=1"
        )
    for key, wanted, least in (("offload_optimizer", parallel.offload_optimizer, 1),
                               ("offload_parameters", parallel.offload_parameters, 3)):  # fmt: skip
        if wanted != "none" and parallel.zero_stage < least:
            raise UserError(
                f"parallel.{key}={wanted} needs parallel.zero_stage={least} or higher: set that, or {key}=none"
            )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence=true spreads positions over tensor-parallel ranks: set parallel.tensor > 1")
    if parallel.sequence and config.data.seq_len % parallel.tensor:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is not a multiple of parallel.tensor={parallel.tensor}, which "
            "parallel.sequence=true needs: change one of them"
        )


def data_parallel_size(tensor: int, num_procs: int) -> int:
    """How many groups of `parallel.tensor` processes there are."""
    if tensor < 1 or num_procs % tensor:
        raise UserError(f"{num_procs} processes are no multiple of parallel.tensor={tensor}: change one of them")
    return num_procs // tensor


def validate_model(model: ModelConfig, tensor: int) -> None:
    vision, language = model.vision, model.language_model
    for key, value, divisor_key, divisor in (
        ("model.vision.image_size", vision.image_size, "model.vision.patch_size", vision.patch_size),
        ("model.vision.width", vision.width, "model.vision.num_heads", vision.num_heads),
        (
            "model.language_model.width",
            language.width if not language.head_width else 0,
            "model.language_model.num_heads",
            language.num_heads,
        ),
        (
            "model.language_model.num_heads",
            language.num_heads,
            "model.language_model.num_kv_heads",
            language.num_kv_heads,
        ),
        ("model.language_model.num_kv_heads", language.num_kv_heads, "parallel.tensor", tensor),
        ("model.language_model.mlp_width", language.mlp_width, "parallel.tensor", tensor),
        (
            "the vocabulary of model.language_model with its special tokens",
            language.vocabulary if language.text_vocab_size else 0,
            "parallel.tensor",
            tensor,
        ),
    ):
        if value % divisor:
            mend = "change one of them"
            if key.startswith("the vocabulary"):
                mend = "model.language_model.num_special_tokens can be larger (and --special-tokens of the import)"
            raise UserError(f"{key}={value} is not a multiple of {divisor_key}={divisor}: {mend}")


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
