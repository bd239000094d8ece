"""The first rows of the demo's run, and which of them the report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from data_pipelines.document import Batch
from data_pipelines.inspecting.packed_rows import ShownRow, show_row
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.tokenizer import Tokenizer
from trainer.config import PretrainConfig

NUM_SHOWN = 3


@dataclass(frozen=True)
class RowSample:
    """The first rows of a training run, and how many documents of each source were in how many of them."""

    shown: list[ShownRow]
    documents: Counter[str]
    num_rows: int


def read_rows(config: PretrainConfig, num_steps: int) -> RowSample:
    """The rows of the run's first steps, read again by its own loader."""
    config.data.num_workers = 0
    tokenizer = Tokenizer(config.data.tokenizer)
    num_queries = config.model.causal_transformer.num_queries
    loader = Loader(
        config.data,
        open_indexes(config.data, build_missing=False),
        tokenizer,
        num_queries=num_queries,
        image_size=config.model.vision.image_size,
        dp_rank=0,
        dp_size=1,
    )
    num_batches = num_steps * config.data.global_batch_rows // config.data.micro_batch_rows
    batches = list(islice(loader, num_batches))
    documents = Counter(key.source for batch in batches for keys in batch.keys for key in keys)
    shown = [show_row(batches[b], r, num_queries, tokenizer) for b, r in choose_rows(batches)]
    return RowSample(shown, documents, sum(len(batch.keys) for batch in batches))


def choose_rows(batches: Sequence[Batch]) -> list[tuple[int, int]]:
    """(batch, row) of a few rows that together show most sources, and each many."""
    sources = {
        (b, r): {key.source for key in keys} for b, batch in enumerate(batches) for r, keys in enumerate(batch.keys)
    }
    chosen: list[tuple[int, int]] = []
    seen: set[str] = set()
    while len(chosen) < NUM_SHOWN and len(chosen) < len(sources):
        left = (place for place in sources if place not in chosen)
        best = max(left, key=lambda place: (len(sources[place] - seen), len(sources[place])))
        chosen.append(best)
        seen |= sources[best]
    return chosen
