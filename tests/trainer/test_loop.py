"""What the ranks of a tensor-parallel group agree upon before a step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from conf import UserError
from tests.distributed.harness import run_distributed
from tests.distributed.parity import batch_by_hand
from trainer.loop import agree_on_failures
from trainer.topology import Topology

pytestmark = pytest.mark.slow


def agree(same: bool) -> str:
    """What a rank of two is told; unless `same`, the second one's row is another."""
    rank = dist.get_rank()
    topology = Topology(rank, 2, 0, 1, rank, 2, None, dist.group.WORLD)
    batches = [batch_by_hand(0, 0, 1), batch_by_hand(0, 1 if same else 1 + rank, 2 if same else 2 + rank)]
    try:
        agree_on_failures(batches, topology, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_read_the_same_rows_go_on() -> None:
    assert run_distributed(agree, 2, True) == ["", ""]


def test_ranks_that_read_different_rows_stop() -> None:
    for sentence in run_distributed(agree, 2, False):
        assert "the ranks of a tensor-parallel group have read different rows" in sentence
