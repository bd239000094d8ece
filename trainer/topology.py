"""Where this process stands in the world = data parallel x tensor parallel."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Topology:
    """Rank r has tp_rank r % tp_size and dp_rank r // tp_size, megatron-core's order. One process needs no groups."""

    rank: int = 0
    world_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    dp_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None
