"""Options of the data pipeline (`conf/data/`). No torch here: launchers check configurations on login nodes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING


@dataclass
class SourceConfig:
    """One corpus.

    kind: pairs | laion | mmc4 | webvid | storyboard | text: who wrote the shards decides how they are read.
    shards: path, glob or brace pattern of the tars. index: folder of the index; "" = made under data.index_dir.
    weight: share of the emitted documents, or of their tokens (data.weight_unit), relative to the other sources;
    0 = left out of the training mixture.
    holdout: share of the samples, chosen by a hash of their key, that is never trained on.
    options: options of the kind (dataclass beside the source in data_pipelines/sources/).
    """

    kind: str = MISSING
    shards: str = MISSING
    index: str = ""
    weight: float = 1.0
    holdout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Where samples come from and how they become rows.

    tokenizer: a tokenizer.model or tokenizer.json, or the folder of a language model that has one.
    max_images_per_row: bounds the memory of a row's pictures; rows of captioned pictures hold fewer tokens than seq_len
    where it is below seq_len / 45 or so.
    global_batch_rows (G): rows a step, over all ranks; a multiple of lanes. micro_batch_rows: rows per rank and
    forward pass. lanes (L): independent streams, fixed for a run; the data-parallel size divides it, so that one with
    many divisors (240, 480) leaves most to do where machines are lost.
    weight_unit: documents | tokens: what the weights of the sources share out.
    window_rows: a lane packs documents of about window_rows x seq_len tokens at a time.
    num_workers: processes of a rank that read and decode; 0 = the rank itself. prefetch_rows: rows that they are ahead.
    chunk_samples, chunk_mb: at most so much is read at a time. buffer_mb: encoded bytes held per rank.
    prefetch_mb: chunks of remote shards that a worker fetches ahead; 0 = none.
    cache_dir: folder on a local disk where a node keeps chunks of remote shards, at most cache_gb; "" = none.
    request_timeout_s: for one read of up to 4 MiB. retry_minutes: how long a read that fails is tried again before the
    run stops; with skip_unreachable its chunk is then passed over instead, for good in this epoch.
    max_image_megapixels, max_member_mb, max_text_characters: larger ones are left out, and counted. seed: of the order
    of the data; the run's own is of the weights.
    """

    sources: dict[str, SourceConfig] = MISSING
    tokenizer: str = MISSING
    index_dir: str = "outputs/index"
    seq_len: int = 2048
    max_images_per_row: int = 48
    global_batch_rows: int = 256
    micro_batch_rows: int = 1
    lanes: int = 256
    window_rows: int = 64
    weight_unit: str = "documents"
    num_workers: int = 2
    prefetch_rows: int = 8
    chunk_samples: int = 64
    chunk_mb: float = 4.0
    buffer_mb: int = 2048
    prefetch_mb: int = 64
    cache_dir: str = ""
    cache_gb: float = 100.0
    request_timeout_s: float = 60.0
    retry_minutes: float = 3.0
    skip_unreachable: bool = False
    max_image_megapixels: float = 64.0
    max_member_mb: float = 256.0
    max_text_characters: int = 100_000
    seed: int = 0


def training_sources(config: DataConfig) -> dict[str, SourceConfig]:
    """The sources of the mixture; their order gives the source numbers of a batch."""
    return {name: source for name, source in config.sources.items() if source.weight > 0}


def index_path(config: DataConfig, source: str) -> Path:
    """Folder of the index of a source: its own, or one under index_dir that is named after what it is made from."""
    settings = config.sources[source]
    made_from = json.dumps([settings.shards, config.chunk_samples, config.chunk_mb])
    return Path(
        settings.index or Path(config.index_dir, f"{source}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}")
    )
