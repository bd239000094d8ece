from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from trainer import host_memory
from trainer.host_memory import ALIGNMENT, HostMemory


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "SLAB", 1024)


def test_copies_are_equal_and_apart() -> None:
    memory = HostMemory()
    torch.manual_seed(0)
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "odd": torch.arange(13, dtype=torch.uint8),
        "half": torch.randn(5, 7).bfloat16(),
        **{f"matrix {n}": torch.randn(n, 11) for n in range(1, 60, 7)},  # the last are larger than a slab
    }
    copies = {key: memory.copy(key, tensor) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        assert copies[key].dtype == tensor.dtype and torch.equal(copies[key], tensor), key
        assert copies[key].data_ptr() % ALIGNMENT == 0 and copies[key].is_contiguous()


def test_the_memory_is_used_again() -> None:
    memory = HostMemory()
    first = memory.copy("weight", torch.ones(8))
    again = memory.copy("weight", torch.zeros(8))
    assert again.data_ptr() == first.data_ptr() and not first.any()
    assert memory.copy("weight", torch.ones(9)).data_ptr() != first.data_ptr()


def test_small_tensors_share_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 of 64 bytes take two slabs of 1024."""
    taken, allocate = list[int](), host_memory._allocate
    monkeypatch.setattr(host_memory, "_allocate", lambda size, pinned: taken.append(size) or allocate(size, pinned))
    memory = HostMemory()
    for number in range(32):
        memory.copy(str(number), torch.ones(16))
    assert taken == [1024, 1024]


def test_without_pinned_memory_other_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty

    def refuse(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(host_memory._allocate(100, pinned=True)) == 100
    assert "no pinned memory for checkpoints (CUDA error: out of memory)" in caplog.text
