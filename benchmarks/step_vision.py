"""The vision part of a tensor-parallel group: each image encoded by one rank, against every image by every rank."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.step_padded import rows_of_lane
from benchmarks.step_ranks import now
from models.emu import Emu
from models.tensor_parallel import gather_images, sum_gradients
from trainer.config import PretrainConfig
from trainer.engine import init_distributed, partial_parameters, set_process_options

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def measure_vision(config: PretrainConfig, num_turns: int) -> list[tuple[float, float]]:
    """Seconds forward and backward, shared and repeated on every rank, turn by turn on the images of a row, after a
    first turn that is not counted. AssertionError where the gradients of the two differ."""
    set_process_options(config.parallel, config.seed)
    topology = init_distributed(config.parallel)
    group = topology.tp_group
    assert group is not None
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    whole, shared = (Emu(config.model, config.objective, len(config.data.sources)).to(device, dtype) for _ in range(2))
    shared.load_state_dict(whole.state_dict())
    sum_gradients(partial_parameters(shared, config.parallel), group)
    rows = zip(rows_of_lane(config, topology.tp_rank, topology.tp_size), rows_of_lane(config), strict=True)
    seconds = []
    title = f"vision, {topology.tp_size} tensor-parallel processes"
    for _ in tqdm(range(num_turns + 1), desc=title, unit="turn", disable=True if topology.rank else None):
        own, every = next(rows)
        gradient = output_gradient(len(every.images), config).to(device, dtype)
        start = now()
        gather_images(shared.encode(own.images.to(device)), own.image_counts, group).backward(gradient)
        ours = now() - start
        start = now()
        whole.encode(every.images.to(device)).backward(gradient)
        seconds.append((ours, now() - start))
        assert_same_gradients(shared, whole, TOLERANCE[dtype])
        shared.zero_grad()
        whole.zero_grad()
    return seconds[1:]


def output_gradient(num_images: int, config: PretrainConfig) -> Tensor:
    """What the language model would hand back: the same on every rank."""
    shape = num_images, config.model.causal_transformer.num_queries, config.model.language_model.width
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def assert_same_gradients(shared: Emu, whole: Emu, tolerance: float) -> None:
    """tolerance: of the difference, relative to the whole gradient's norm."""
    pairs = [(a.grad, b.grad) for a, b in zip(shared.parameters(), whole.parameters(), strict=True)]
    found = [(a.float(), b.float()) for a, b in pairs if a is not None and b is not None]
    assert found and len(found) == sum(b is not None for _, b in pairs), "a parameter has no gradient"
    difference, norm = (torch.stack([part.norm() for part in parts]).norm()
                        for parts in ([a - b for a, b in found], [b for _, b in found]))  # fmt: skip
    assert difference <= tolerance * norm, f"the gradients differ by {float(difference / norm):.2e}"
