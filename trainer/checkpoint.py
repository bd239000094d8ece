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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from conf import UserError
from models.weights.description import read_description
from models.weights.fragment_files import WEIGHT, FragmentReader
from trainer.checkpoint_folder import STATE, SavedState, find_damage, rank_state_path
from trainer.engine_state import (
    MOMENTS,
    OwnedSlice,
    base_optimizer,
    create_moments,
    global_shapes,
    owned_slices,
    publish_weights,
)
from trainer.topology import Topology

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


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
    return json.loads(rank_state_path(path, topology.rank).read_text(encoding="utf-8"))


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
