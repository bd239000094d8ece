"""What a run has read so far, over all ranks: documents, skips, mixture, epochs; and the memory that it takes."""

from __future__ import annotations

import resource
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from trainer.state import TrainState, sample_counts
from trainer.topology import Topology

GB = 1e9


def gather_counts(state: TrainState, topology: Topology, epoch_sizes: dict[str, int]) -> dict[str, Any]:
    """samples, skips (`sample_counts`); mixture/SOURCE: share of the documents; epoch/SOURCE: how often the source has
    been gone through, skips included; memory/...: of the rank that takes most. Collective.

    epoch_sizes: samples of each source.
    """
    counts: dict[str, Any] = sample_counts(state, topology)
    samples, skips = counts["samples"], Counter[str]()
    for name, number in counts["skips"].items():
        skips[name.partition(": ")[0]] += number
    total = sum(samples.values())
    for source, size in epoch_sizes.items():
        counts[f"mixture/{source}"] = samples.get(source, 0) / max(1, total)
        counts[f"epoch/{source}"] = (samples.get(source, 0) + skips[source]) / size
    return counts | _memory(topology)


def _memory(topology: Topology) -> dict[str, float]:
    """Largest so far of any rank, in GB: of the process itself, and what torch has held on its device."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    used = {"memory/host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB}
    if device.type == "cuda":
        used["memory/device_gb"] = torch.cuda.max_memory_allocated() / GB
    values = torch.tensor(list(used.values()), device=device)
    if topology.world_size > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(used, values.tolist(), strict=True))
