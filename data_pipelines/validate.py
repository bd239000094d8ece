"""Whether a data configuration can be run: sizes that must divide each other, weights, shares. No torch here."""

from __future__ import annotations

import math

from conf import UserError
from data_pipelines.config import DataConfig, SourceConfig

WEIGHT_UNITS = ("documents", "tokens")
POSITIVE = (
    "max_images_per_row",
    "global_batch_rows",
    "micro_batch_rows",
    "lanes",
    "window_rows",
    "prefetch_rows",
    "chunk_samples",
    "chunk_mb",
    "max_image_megapixels",
    "max_member_mb",
    "max_text_characters",
    "cache_gb",
    "request_timeout_s",
)


def validate_batching(config: DataConfig, dp_size: int, num_queries: int) -> None:
    """Raises UserError for what `dp_size` data-parallel ranks cannot run; num_queries: embeddings an image."""
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            raise UserError(f"data.{name}={getattr(config, name)} must be positive")
    for name in ("num_workers", "buffer_mb", "prefetch_mb", "retry_minutes", "seed"):
        if getattr(config, name) < 0:
            raise UserError(f"data.{name}={getattr(config, name)} must not be negative")
    _validate_sizes(config, dp_size, num_queries)
    if not config.sources:
        raise UserError("data.sources is empty: name at least one source")
    for name, source in config.sources.items():
        _validate_source(name, source)
    if config.weight_unit not in WEIGHT_UNITS:
        raise UserError(f"data.weight_unit={config.weight_unit} is unknown: choose one of {', '.join(WEIGHT_UNITS)}")
    if all(source.weight == 0 for source in config.sources.values()):
        raise UserError("all data.sources have weight 0: give at least one of them a positive weight")


def _validate_sizes(config: DataConfig, dp_size: int, num_queries: int) -> None:
    if config.lanes % dp_size:
        fewer = _largest_divisor(config.lanes, dp_size)
        raise UserError(
            f"data.lanes={config.lanes} cannot be shared by {dp_size} data-parallel ranks: "
            f"make it a multiple of {dp_size}, or, in a run that has begun, take {fewer}"
        )
    if config.global_batch_rows % config.lanes:
        raise UserError(
            f"data.global_batch_rows={config.global_batch_rows} is no multiple of data.lanes={config.lanes}: "
            "every lane gives the same number of rows to a step"
        )
    rows_per_rank = config.global_batch_rows // dp_size
    if rows_per_rank % config.micro_batch_rows:
        raise UserError(
            f"data.micro_batch_rows={config.micro_batch_rows} does not divide the {rows_per_rank} rows of a rank "
            f"(data.global_batch_rows={config.global_batch_rows} over {dp_size} data-parallel ranks): choose a divisor"
        )
    shortest = num_queries + 2 + 2 + 1
    if config.seq_len < shortest:
        raise UserError(
            f"data.seq_len={config.seq_len} is too small for one image of {num_queries} embeddings and a word: "
            f"make it at least {shortest}"
        )


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(limit, 0, -1) if number % divisor == 0)


def _validate_source(name: str, source: SourceConfig) -> None:
    if not (math.isfinite(source.weight) and source.weight >= 0):
        raise UserError(f"data.sources.{name}.weight={source.weight} must be a number of at least 0 (0 leaves it out)")
    if not 0 <= source.holdout <= 1:
        raise UserError(f"data.sources.{name}.holdout={source.holdout} must lie between 0 and 1")
