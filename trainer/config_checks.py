"""Whether a configuration can be run, and is meant: asked before any process or model exists. No torch here."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from conf import UserError
from data_pipelines.stores import is_local
from data_pipelines.validate import validate_batching
from models.config import ModelConfig
from models.weights.description import read_description
from trainer.config import PretrainConfig

RETRIES_IN_A_STEP = 3
"""Unreachable chunks that a step may wait for, one after the other."""
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
