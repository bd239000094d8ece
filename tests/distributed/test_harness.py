from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed


def sum_of_ranks(scale: int) -> tuple[int, str, int]:
    total = torch.tensor([dist.get_rank() * scale])
    dist.all_reduce(total)
    return int(total), os.environ["LOCAL_RANK"], torch.get_num_threads()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def hang() -> None:
    time.sleep(600)


@pytest.mark.slow
def test_results_come_back_by_rank() -> None:
    assert run_distributed(sum_of_ranks, 2, 10) == [(10, "0", 1), (10, "1", 1)]


@pytest.mark.slow
def test_the_first_error_is_raised_with_its_rank_and_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed(.|\n)*in fail_on_rank_one(.|\n)*rank one is unwell"):
        run_distributed(fail_on_rank_one, 2)


@pytest.mark.slow
def test_a_hanging_run_ends_at_the_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0\] had not ended after 3 s"):
        run_distributed(hang, 1, timeout_s=3)
    assert time.monotonic() - started < 20
