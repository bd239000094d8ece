"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("EMU_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data" / "real"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real shards written by other people's tools; not part of a clone (EMU_REAL_DATA names another copy)."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real shards at {REAL_DATA}: set EMU_REAL_DATA to a folder that has them")
    return REAL_DATA
