"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_pipelines.conftest import tokenizer_path  # noqa: F401 # a fixture
from tests.trainer.tiny_job import write_corpora


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for EMU_DATA, see `write_corpora`."""
    folder = tmp_path_factory.mktemp("emu_data")
    write_corpora(folder)
    return folder
