"""Write checkpoints while training goes on: the step waits for a copy in host memory, a thread writes the files.

start    copy this rank's slices, then write them in the background      every rank
finish   wait for the files, manifest, final name, `latest`              collective
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from conf import UserError
from models.weights.fragment_files import WEIGHT, FragmentValues, fragment_key, write_fragments, write_json
from trainer.checkpoint_folder import (
    DIGEST,
    STATE,
    SavedState,
    checkpoint_path,
    commit,
    describe_file,
    new_digest,
    partial_path,
    rank_state_path,
    start_partial,
)
from trainer.engine_state import MOMENTS, base_optimizer, has_moments, owned_slices, step_count
from trainer.host_memory import HostMemory
from trainer.topology import Topology

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

T = TypeVar("T")
Facts = dict[str, dict[str, Any]]
"""Size and digest by name of a file."""
LOWEST_PRIORITY = 19


@dataclass
class _Pending:
    final: Path
    saved: SavedState
    files: Future[Facts]


class CheckpointWriter:
    """One checkpoint at a time of a run folder. All ranks call its methods in the same order."""

    def __init__(self, run_folder: Path, topology: Topology) -> None:
        self._run_folder, self._topology = run_folder, topology
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_step_aside)
        self._host = HostMemory()
        self._pending: _Pending | None = None

    def start(
        self,
        engine: DeepSpeedEngine,
        step: int,
        state: dict[str, Any],
        rank_state: dict[str, Any],
        permanent: bool = False,
    ) -> None:
        """Copy what the checkpoint of `step` holds and begin to write it. Collective; nothing else may be in flight.

        state (the same on all ranks) and rank_state (this rank's) must be JSON-able. UserError on every rank where one
        cannot begin.
        """
        assert self._pending is None, "finish the checkpoint before first"
        topology, final = self._topology, checkpoint_path(self._run_folder, step)
        values: list[FragmentValues] = []

        def copy() -> None:
            if topology.rank == 0:
                start_partial(final)
            values.extend(self._on_host(value) for value in _values_to_store(engine, topology))
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()

        _on_all_ranks(topology, final, copy)  # from here on the folder is there for all of them
        saved = SavedState(step, topology.dp_size, topology.tp_size, permanent, state)
        files = self._thread.submit(_write_rank, partial_path(final), topology.rank, values, rank_state)
        self._pending = _Pending(final, saved, files)

    @property
    def in_flight(self) -> bool:
        """Whether there is a checkpoint to finish; the same on all ranks."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are not yet written."""
        return self._pending is not None and not self._pending.files.done()

    def finish(self) -> Path:
        """Wait for the files of all ranks and make the checkpoint the latest. Collective; UserError on every rank if
        one could not write, and then the checkpoints before are as they were."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        facts = _on_all_ranks(self._topology, pending.final, pending.files.result)
        is_first = self._topology.rank == 0
        _on_all_ranks(self._topology, pending.final, lambda: _commit(pending, facts) if is_first else None)
        return pending.final

    def _on_host(self, value: FragmentValues) -> FragmentValues:
        name = value.fragment.name
        copies = {kind: self._host.copy(fragment_key(name, kind), tensor) for kind, tensor in value.tensors.items()}
        return replace(value, tensors=copies)


def save_checkpoint(
    run_folder: Path,
    engine: DeepSpeedEngine,
    topology: Topology,
    step: int,
    state: dict[str, Any],
    rank_state: dict[str, Any],
    permanent: bool = False,
) -> Path:
    """Write the checkpoint of `step` at once and make it the latest. Collective; every rank raises if one cannot."""
    writer = CheckpointWriter(run_folder, topology)
    writer.start(engine, step, state, rank_state, permanent)
    return writer.finish()


def _step_aside() -> None:
    """This thread computes digests while training computes: with equal rights a step on all cores takes three times as
    long, for its threads wait for the one that shares a core."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)


def _commit(pending: _Pending, of_ranks: list[Facts]) -> None:
    state_path = partial_path(pending.final) / STATE
    write_json(state_path, asdict(pending.saved))
    files = {name: facts for of_rank in of_ranks for name, facts in of_rank.items()}
    commit(pending.final, files | {STATE: describe_file(state_path)})


def _write_rank(folder: Path, rank: int, values: list[FragmentValues], rank_state: dict[str, Any]) -> Facts:
    digest = new_digest()
    data, index = write_fragments(folder, rank, values, digest)
    write_json(rank_state_path(folder, rank), rank_state)
    return {
        data.name: {"size": data.stat().st_size, DIGEST: digest.hexdigest()},
        **{path.name: describe_file(path) for path in (index, rank_state_path(folder, rank))},
    }


def _values_to_store(engine: DeepSpeedEngine, topology: Topology) -> Iterator[FragmentValues]:
    optimizer = base_optimizer(engine)
    for owned in owned_slices(engine, topology):
        if owned.is_primary:
            tensors = {WEIGHT: owned.weight}
            if has_moments(optimizer, owned):
                tensors |= {name: owned.moment(optimizer, name) for name in MOMENTS}
            yield FragmentValues(owned.fragment, tensors, step_count(optimizer, owned))


def _on_all_ranks(topology: Topology, final: Path, action: Callable[[], T]) -> list[T]:
    """Results of all ranks, by rank. If one fails all raise, so that none is left waiting for it."""
    result, cause, problem = None, None, None
    try:
        result = action()
    except Exception as error:
        cause, problem = error, f"rank {topology.rank}: {error}"
    outcomes: list[Any] = [(result, problem)]
    if topology.world_size > 1:
        outcomes = [None] * topology.world_size
        dist.all_gather_object(outcomes, (result, problem))
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        raise UserError(
            f"the checkpoint {final} was not written ({problems[0]}): mend that and resume from the one before"
        ) from cause
    return [result for result, _ in outcomes]
