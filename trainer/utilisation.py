"""Model FLOPs utilisation: what a step has to compute over what the device can do in its time (PaLM, appendix B)."""

from __future__ import annotations

import torch

from data_pipelines.document import Batch
from models.config import ModelConfig
from models.flops import forward_flops
from trainer.loop import StepCounts
from trainer.topology import Topology

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""Dense bf16 operations a second by a part of the device's name, from the vendor's data sheets. The first match counts;
the PCIe variants of a card are slower, so that their utilisation is understated."""


def peak_flops(device_name: str) -> float | None:
    """None for a device that the table does not know, a CPU among them."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def step_flops(config: ModelConfig, batches: list[Batch], text_targets: int, image_targets: int) -> int:
    """Of forward and backward over these batches; what is computed again or for padding does not count.

    text_targets, image_targets: of the batches.
    """
    lengths = [length for batch in batches for length in document_lengths(batch)]
    num_images = sum(len(batch.image_starts) for batch in batches)
    return 3 * forward_flops(config, lengths, num_images, text_targets, image_targets)


def step_rates(
    config: ModelConfig, batches: list[Batch], counts: StepCounts, topology: Topology, seconds: float
) -> dict[str, float]:
    """tokens and images a second over all ranks; flops_per_second and mfu of one device.

    This rank's batches stand for all. mfu is left out where the device's peak is not known.
    """
    share = [number // topology.dp_size for number in (counts.text_targets, counts.image_targets)]
    flops = step_flops(config, batches, *share) / topology.tp_size / seconds
    rates = {
        "tokens_per_second": counts.tokens / seconds,
        "images_per_second": counts.images / seconds,
        "flops_per_second": flops,
    }
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {**rates, "mfu": flops / peak} if peak else rates


def document_lengths(batch: Batch) -> list[int]:
    """Of every document in tokens, row by row."""
    rows = (torch.bincount(row[row > 0]) for row in batch.document_ids)
    return [length for row in rows for length in row.tolist() if length]
