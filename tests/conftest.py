"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("EMU_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data" / "real"))


def pytest_configure(config: pytest.Config) -> None:
    """Tests compare what CPUs compute, bit for bit; those that need a GPU run alone: `make test-gpu`."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real shards written by other people's tools; not part of a clone (EMU_REAL_DATA names another copy)."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real shards at {REAL_DATA}: set EMU_REAL_DATA to a folder that has them")
    return REAL_DATA


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """The system lets no file of this process grow beyond so many bytes: "File too large" stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
