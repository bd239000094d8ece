"""How a rank's error ends the run: with which code, and in which words."""

from __future__ import annotations

import torch
from torch.distributed import DistError

from conf import UserError
from trainer.stop import START_AGAIN
from trainer.topology import Topology

CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
WORKER = "DataLoader worker"
MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class InterruptedRunError(UserError):
    """Nothing is wrong with the command: what died may live the next time."""

    code = START_AGAIN


def as_user_error(error: Exception, topology: Topology) -> UserError | None:
    """The sentence and the code for an error that is no defect of this program, else None."""
    message, rank = str(error), topology.rank
    if isinstance(error, UserError):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _has(error, MEMORY):
        return UserError(
            f"rank {rank} ran out of memory ({_first_line(message)}): lower data.micro_batch_rows, set "
            "parallel.activation_checkpointing=full or a higher parallel.zero_stage, and see python -m launch.plan"
        )
    if _has(error, (WORKER,)):
        return InterruptedRunError(
            f"a loader worker of rank {rank} died ({_first_line(message)}): start the run again, and if it dies again "
            "lower data.num_workers or data.buffer_mb"
        )
    if lost_connection(error):
        return InterruptedRunError(
            f"rank {rank} lost the connection to another rank, which was killed or is out of reach"
        )
    return None


def lost_connection(error: Exception) -> bool:
    """Whether another rank's end is what broke this one's collective operation."""
    return isinstance(error, DistError) or _has(error, CONNECTION)


def _has(error: Exception, parts: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(part in str(error) for part in parts)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:200] if message.strip() else "no message"
