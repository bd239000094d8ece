"""Checkpoints that any (data parallel, tensor parallel, ZeRO) layout reads and writes.

    step-00000100/
        fragments-00000.safetensors     rank 0's slices: fp32 weights, exp_avg, exp_avg_sq
        fragments-00000.json            which slices they are, and Adam's step count
        rank_state-00000.json           what only rank 0 can restore, such as its random states
        state.json                      step, world layout, and everything else the run needs to go on
        manifest.json                   size and digest of every file, written last

Every weight is stored once over the whole world, by the rank whose optimizer updates it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from conf import UserError
from models.weights.description import read_description
from models.weights.fragment_files import (
    WEIGHT,
    FragmentReader,
    FragmentValues,
    read_weights,
    write_fragments,
    write_json,
)
from trainer.checkpoint_folder import (
    STATE,
    checkpoint_path,
    commit,
    describe_file,
    find_damage,
    find_latest,
    partial_path,
    prune,
    start_partial,
)
from trainer.engine_state import (
    MOMENTS,
    OwnedSlice,
    base_optimizer,
    create_moments,
    global_shapes,
    has_moments,
    owned_slices,
    publish_weights,
    step_count,
)
from trainer.topology import Topology

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = [
    "SavedState",
    "find_damage",
    "find_latest",
    "load_checkpoint",
    "prune",
    "read_rank_state",
    "read_state",
    "read_weights",
    "save_checkpoint",
]

T = TypeVar("T")


@dataclass(frozen=True)
class SavedState:
    """state: the caller's dict. permanent: never pruned."""

    step: int
    dp_size: int
    tp_size: int
    permanent: bool
    state: dict[str, Any]


def save_checkpoint(
    run_folder: Path,
    engine: DeepSpeedEngine,
    topology: Topology,
    step: int,
    state: dict[str, Any],
    rank_state: dict[str, Any],
    permanent: bool = False,
) -> Path:
    """Write the checkpoint of `step` and make it the latest. Collective; every rank raises if one cannot write.

    state (the same on all ranks) and rank_state (this rank's) must be JSON-able.
    """
    final = checkpoint_path(run_folder, step)
    saved = SavedState(step, topology.dp_size, topology.tp_size, permanent, state)
    on_all_ranks = partial(_on_all_ranks, topology, f"the checkpoint {final} was not written")
    on_all_ranks(lambda: start_partial(final) if topology.rank == 0 else None)
    described = on_all_ranks(lambda: _write_rank(partial_path(final), engine, topology, rank_state))
    on_all_ranks(lambda: _finish(final, saved, described) if topology.rank == 0 else None)
    return final


def read_state(path: Path) -> SavedState:
    """What a checkpoint knows beside the weights; needs no engine."""
    damage = find_damage(path, digests=False)
    if damage:
        raise UserError(f"{path} is not a whole checkpoint ({damage}): name another one")
    return SavedState(**json.loads((path / STATE).read_text(encoding="utf-8")))


def read_rank_state(path: Path, topology: Topology) -> dict[str, Any] | None:
    """This rank's own state, or None if the checkpoint was written by another number or arrangement of ranks."""
    saved = read_state(path)
    if (saved.dp_size, saved.tp_size) != (topology.dp_size, topology.tp_size):
        return None
    return json.loads(_rank_state_path(path, topology.rank).read_text(encoding="utf-8"))


def load_checkpoint(path: Path, engine: DeepSpeedEngine, topology: Topology, with_optimizer: bool = True) -> SavedState:
    """Put weights and Adam's state into an engine of any layout. Collective.

    Parameters whose moments the checkpoint lacks, or all if with_optimizer is false, start with fresh ones. Looks at
    names and sizes of the files only: `find_latest` and `find_damage` compare digests.
    """
    saved = read_state(path)
    reader = FragmentReader(path)
    _check_same_model(path, reader.shapes(), global_shapes(engine, topology))
    slices = list(owned_slices(engine, topology))
    _load_weights(reader, slices, topology)
    _load_moments(reader, engine, slices, with_optimizer)
    publish_weights(engine)
    return saved


def load_imported(path: Path, engine: DeepSpeedEngine, topology: Topology) -> None:
    """Put the weights of a folder that `models.weights.import_` made into an engine of any layout. Collective.

    Parameters of parts that the folder does not hold keep their start. Raises UserError for other names or shapes.
    """
    reader = FragmentReader(path)
    description = read_description(path)
    wanted = global_shapes(engine, topology)
    imported = tuple(description["prefixes"])
    own = {n: s for n, s in wanted.items() if n.startswith(imported) and n not in description["fresh"]}
    _check_same_model(path, reader.shapes(), own)
    _load_weights(reader, [o for o in owned_slices(engine, topology) if o.fragment.name in own], topology)
    publish_weights(engine)


def _load_weights(reader: FragmentReader, slices: list[OwnedSlice], topology: Topology) -> None:
    for owned in tqdm(slices, desc=f"loading {reader.folder.name}", unit="slice", delay=5, disable=topology.rank != 0):
        owned.weight.copy_(reader.read(owned.fragment, WEIGHT))


def _load_moments(
    reader: FragmentReader, engine: DeepSpeedEngine, slices: list[OwnedSlice], with_optimizer: bool
) -> None:
    optimizer = base_optimizer(engine)
    trained = [owned for owned in slices if owned.owner is not None]
    stored = {o.fragment.name: with_optimizer and reader.has(o.fragment.name, MOMENTS[0]) for o in trained}
    # A flat owner of many parameters has one count for all of them.
    num_updates: dict[torch.Tensor | None, int] = {}
    for owned in trained:
        count = reader.num_updates(owned.fragment.name) if stored[owned.fragment.name] else 0
        num_updates[owned.owner] = max(count, num_updates.get(owned.owner, 0))
    for owned in trained:
        create_moments(engine, owned, num_updates[owned.owner])
        for name in MOMENTS:
            moment = owned.moment(optimizer, name)
            if stored[owned.fragment.name]:
                moment.copy_(reader.read(owned.fragment, name))
            else:
                moment.zero_()


def _finish(final: Path, saved: SavedState, described: list[dict[str, dict[str, Any]]]) -> None:
    state_path = partial_path(final) / STATE
    write_json(state_path, asdict(saved))
    files = {name: facts for of_rank in described for name, facts in of_rank.items()}
    commit(final, files | {STATE: describe_file(state_path)})


def _write_rank(
    folder: Path, engine: DeepSpeedEngine, topology: Topology, rank_state: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    written = write_fragments(folder, topology.rank, _values_to_store(engine, topology))
    rank_state_path = _rank_state_path(folder, topology.rank)
    write_json(rank_state_path, rank_state)
    return {path.name: describe_file(path) for path in [*written, rank_state_path]}


def _values_to_store(engine: DeepSpeedEngine, topology: Topology) -> Iterator[FragmentValues]:
    optimizer = base_optimizer(engine)
    for owned in owned_slices(engine, topology):
        if owned.is_primary:
            tensors = {WEIGHT: owned.weight}
            if has_moments(optimizer, owned):
                tensors |= {name: owned.moment(optimizer, name) for name in MOMENTS}
            yield FragmentValues(owned.fragment, tensors, step_count(optimizer, owned))


def _rank_state_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_state-{rank:05d}.json"


def _check_same_model(path: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise `UserError` with the first few differences of names or global shapes."""
    differences = [f"{name} is only in the model" for name in sorted(wanted.keys() - stored.keys())]
    differences += [f"{name} is only in the checkpoint" for name in sorted(stored.keys() - wanted.keys())]
    differences += [
        f"{name} has shape {list(stored[name])} in the checkpoint and {list(wanted[name])} in the model"
        for name in sorted(stored.keys() & wanted.keys())
        if stored[name] != wanted[name]
    ]
    if differences:
        more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise UserError(
            f"{path} is a checkpoint of another model ({'; '.join(differences[:3])}{more}): "
            "use the model settings it was written with, or another one"
        )


def _on_all_ranks(topology: Topology, failure: str, action: Callable[[], T]) -> list[T]:
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
        raise UserError(f"{failure} ({problems[0]}): mend that and resume from the one before") from cause
    return [result for result, _ in outcomes]
