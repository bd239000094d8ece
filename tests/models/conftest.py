"""A world of one process: the layers of the language model ask for their tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state


@pytest.fixture(scope="package", autouse=True)
def single_process_group() -> Iterator[None]:
    """A gloo group of one process, with megatron-core's groups (tensor-parallel size 1); gone after the package."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
