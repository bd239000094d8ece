"""The state of a run beside weights and optimizer: made, saved into checkpoints, and brought back from them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from conf import UserError
from data_pipelines.document import Batch, Cursor
from trainer.checkpoint import load_checkpoint, read_rank_state, read_state
from trainer.checkpoint_folder import candidates, find_damage, first_whole
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import CheckpointConfig, GuardConfig, PretrainConfig
from trainer.diagnostics import StepSums, TargetVariance
from trainer.guards import LossHistory, Problem
from trainer.topology import Topology

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class TrainState:
    """Steps done, where each lane of this rank goes on, the objective's memory, and what this rank has trained on.

    samples: documents by source. skips: samples passed over, by (source, reason). changes: of the data order, made when
    the run was last resumed. bad_steps: thrown away, in a row. rollbacks: steps of the latest ones.
    """

    step: int = 0
    cursors: dict[int, Cursor] = field(default_factory=dict)
    variance: TargetVariance = field(default_factory=TargetVariance)
    samples: Counter[str] = field(default_factory=Counter)
    skips: Counter[tuple[str, str]] = field(default_factory=Counter)
    changes: list[str] = field(default_factory=list)
    history: LossHistory = field(default_factory=LossHistory)
    bad_steps: int = 0
    rollbacks: list[int] = field(default_factory=list)

    def count_step(self, text_loss: float | None, sums: StepSums, problem: Problem | None, guard: GuardConfig) -> None:
        """One more step. One that was thrown away counts, as its data do, and leaves no other trace."""
        self.step += 1
        if problem:
            self.bad_steps += 1
            return
        self.bad_steps = 0
        self.variance.update(sums)
        if text_loss is not None:
            self.history.update(text_loss, guard)

    def record(self, batches: list[Batch]) -> None:
        """Move the lanes on to what has now been *trained*; prefetched rows do not count."""
        for batch in batches:
            self.cursors.update(batch.cursors)
            self.samples.update(key.source for row in batch.keys for key in row)
            self.skips.update(batch.all_skips())


def from_rank_0(topology: Topology, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give its result to all ranks. Its error ends the others silently: one sentence."""
    box: list[Any] = [None, False]
    problem = None
    if topology.rank == 0:
        try:
            box[0] = action()
        except Exception as error:
            box[1], problem = True, error
    if topology.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1]:
        raise problem if problem is not None else SystemExit(2)
    return box[0]


def sample_counts(state: TrainState, topology: Topology) -> dict[str, dict[str, int]]:
    """`samples` by source and `skips` by "source: reason" since the run began, over all ranks. Collective."""
    own = (state.samples if topology.tp_rank == 0 else Counter(), state.skips)  # a group trains on the same samples
    counters: list[Any] = [own]
    if topology.world_size > 1:
        counters = [None] * topology.world_size
        dist.all_gather_object(counters, own)
    samples: Counter[str] = sum((of_rank for of_rank, _ in counters), Counter())
    skips: Counter[tuple[str, str]] = sum((of_rank for _, of_rank in counters), Counter())
    return {
        "samples": dict(sorted(samples.items())),
        "skips": {f"{source}: {reason}": count for (source, reason), count in sorted(skips.items())},
    }


def begin_save(
    writer: CheckpointWriter,
    config: PretrainConfig,
    engine: DeepSpeedEngine,
    state: TrainState,
    order: dict[str, str],
    sources: list[str],
    topology: Topology,
    permanent: bool,
) -> None:
    """Begin to write a checkpoint of `state`. Collective. sources: their names in the order of the cursors."""
    cursors: list[Any] = [state.cursors]
    if topology.dp_size > 1:
        cursors = [None] * topology.dp_size
        dist.all_gather_object(cursors, state.cursors, group=topology.dp_group)
    lanes = {lane: cursor for of_rank in cursors for lane, cursor in of_rank.items()}
    shared = {
        "cursors": {str(lane): asdict(cursor) for lane, cursor in sorted(lanes.items())},
        "sources": {name: config.data.sources[name].weight for name in sources},
        "target_variance": state.variance.value,
        "loss_history": state.history.saved(),
        "bad_steps": state.bad_steps,
        "rollbacks": state.rollbacks,
        **sample_counts(state, topology),
        "order": order,
        "config": asdict(config),
    }
    writer.start(engine, state.step, shared, random_states(), permanent)


def random_states() -> dict[str, str]:
    """Of this rank, as JSON keeps them."""
    states = {"torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda_rng"] = torch.cuda.get_rng_state()
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def restore_random_states(saved: dict[str, str]) -> None:
    setters = {"torch_rng": torch.set_rng_state, "cuda_rng": torch.cuda.set_rng_state}
    for name, state in saved.items():
        if name == "torch_rng" or torch.cuda.is_available():
            setters[name](torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def find_checkpoint(config: PretrainConfig, topology: Topology) -> tuple[Path | None, list[str]]:
    """The run folder's newest whole checkpoint, and the sources that it has begun to read; None, [] in a new run."""
    path = find_newest(Path(config.run_dir), topology)
    if path is None:
        return None, []
    if config.checkpoint.resume == "never":
        raise UserError(
            f"run_dir={config.run_dir} has checkpoints and checkpoint.resume=never: choose another folder, or "
            f"checkpoint.resume=auto to go on"
        )
    return path, list(read_state(path).state["sources"])


def find_newest(run_dir: Path, topology: Topology, before: int | None = None) -> Path | None:
    """As `find_latest`, of an earlier step than `before`. Collective: every rank reads its share of the bytes."""

    def examine(path: Path) -> str | None:
        damages: list[Any] = [find_damage(path, share=(topology.rank, topology.world_size))]
        if topology.world_size > 1:
            own, damages = damages[0], [None] * topology.world_size
            dist.all_gather_object(damages, own)
        return next((damage for damage in damages if damage), None)

    paths = from_rank_0(topology, lambda: candidates(run_dir, before))
    return first_whole(paths, examine, log.warning if topology.rank == 0 else log.debug)


def resume(
    path: Path,
    config: PretrainConfig,
    engine: DeepSpeedEngine,
    order: dict[str, str],
    sources: list[str],
    topology: Topology,
) -> TrainState:
    """State of a checkpoint, weights and optimizer put into `engine`. sources: as `run_sources` gives them."""
    saved = read_state(path)
    changes = _check_order(path, saved.state["order"], order, config.checkpoint)
    load_checkpoint(path, engine, topology)
    own = read_rank_state(path, topology)
    if own is not None:
        restore_random_states(own)
    weights = {name: config.data.sources[name].weight for name in sources}
    return _restore(saved.step, saved.state, weights, changes, topology)


def _restore(
    step: int, saved: dict[str, Any], weights: dict[str, float], changes: list[str], topology: Topology
) -> TrainState:
    samples: Counter[str] = Counter()
    skips: Counter[tuple[str, str]] = Counter()
    if topology.rank == 0:
        samples.update(saved["samples"])
        for name, count in saved["skips"].items():
            source, _, reason = name.partition(": ")
            skips[source, reason] = count
    own_lanes = len(saved["cursors"]) // topology.dp_size
    first = topology.dp_rank * own_lanes
    lanes = range(first, first + own_lanes)
    cursors = {lane: _restore_cursor(lane, saved["cursors"][str(lane)], saved["sources"], weights) for lane in lanes}
    variance, history = TargetVariance(saved["target_variance"]), LossHistory(**saved["loss_history"])
    guards = history, saved["bad_steps"], saved["rollbacks"]
    return TrainState(step, cursors, variance, samples, skips, changes, *guards)


def _restore_cursor(lane: int, saved: dict[str, Any], then: dict[str, float], now: dict[str, float]) -> Cursor:
    """A lane reads the window in which it stands to its end by the weights of then (by source), the next by those of
    now. Sources that were added stand at their beginning."""
    num_added = len(now) - len(then)
    weights: tuple[float, ...] = ()
    if saved["row"] > 0 and (saved["weights"] or then != now):
        weights = (*(saved["weights"] or then.values()), *[0.0] * num_added)
    sources = (*map(tuple, saved["sources"]), *[(lane, 0)] * num_added)
    return Cursor(saved["window"], saved["row"], sources, tuple(map(tuple, saved["unreachable"])), weights)


def _check_order(path: Path, saved: dict[str, str], now: dict[str, str], config: CheckpointConfig) -> list[str]:
    """What the data order depends on and has changed since, if that is allowed."""
    changes = [
        f"{key} was {saved.get(key, 'absent')} and is {now.get(key, 'absent')}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if saved["data.lanes"] != now["data.lanes"]:
        raise UserError(
            f"{path}: data.lanes was {saved['data.lanes']} and is {now['data.lanes']}: it is fixed for a run"
        )
    if changes and not config.allow_changes:
        raise UserError(
            f"{path} was written with another data order ({'; '.join(changes[:4])}): restore these settings, choose "
            f"another run_dir, or set checkpoint.allow_changes=true"
        )
    return changes
