"""Pretraining: `python -m trainer.pretrain`, `deepspeed trainer/pretrain.py`, or a launcher that sets RANK, WORLD_SIZE.

Reads top to bottom: main -> train -> training_step (loop.py) -> Emu.forward (models/emu.py).
"""

from __future__ import annotations

import trainer  # noqa: F401 # quiets the libraries, which run as a script would otherwise import first

# isort: split

import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import hydra
import torch.distributed as dist
from omegaconf import DictConfig

from conf import UserError, run_cli
from conf.composing import CONF_DIR
from data_pipelines.document import Cursor
from data_pipelines.index import Index
from data_pipelines.loader import Loader, fingerprint, open_indexes
from data_pipelines.tokenizer import Tokenizer
from trainer import run_folder
from trainer.check import check
from trainer.checkpoint import load_imported
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import PretrainConfig, fill_vocabulary, register_schemas, to_dataclass
from trainer.config_checks import doubtful, validate
from trainer.endings import as_user_error, lost_connection
from trainer.engine import build_engine, init_distributed, set_process_options
from trainer.held_out import HeldOut
from trainer.monitor import Monitor, quiet_libraries, say
from trainer.profiling import Profiler
from trainer.rollback import roll_back
from trainer.saving import Saver
from trainer.state import TrainState, begin_save, due, find_checkpoint, from_rank_0, resume
from trainer.step import Job, one_step
from trainer.stop import STOPPED_BY_SIGNAL, StopRequest
from trainer.topology import Topology
from trainer.validation import run_validation
from trainer.watchdog import Watchdog

log = logging.getLogger(__name__)

SPEAKING_S = 2.0
"""So long the other ranks wait for rank 0 to say what is wrong: launchers kill all ranks when one has ended."""


def train(config: PretrainConfig) -> int:
    """Run the job to total_steps, stop_after_step, a signal or the time limit. Returns the exit code."""
    tokenizer = fill_vocabulary(config)
    set_process_options(config.parallel, config.seed)
    topology = init_distributed(config.parallel)
    validate(config, topology.dp_size)
    run_dir = Path(config.run_dir)
    attempt = from_rank_0(topology, lambda: run_folder.start_attempt(run_dir))
    stop = StopRequest(config.stop_after_minutes)  # before the launcher can find this process and signal it
    run_folder.write_pid(run_dir, topology.rank)
    monitor = None
    if topology.rank == 0:
        run_folder.write_config(run_dir, asdict(config))
        monitor = Monitor(run_dir, config.monitor, asdict(config), attempt)
    try:
        code, reason = run_steps(config, tokenizer, topology, monitor, stop, attempt)
    except Exception as error:
        # All ranks may find the same, or one rank's end breaks the collectives of the others: one of them says why.
        known = as_user_error(error, topology)
        if lost_connection(error) and run_folder.has_ended(run_dir):
            raise SystemExit(2) from error
        code, sentence = (known.code, str(known)) if known else (1, f"rank {topology.rank}: {error!r}")
        if not run_folder.write_exit(run_dir, code, sentence) and known:
            raise SystemExit(code) from error
        raise known or error from error
    finally:
        if monitor is not None:
            monitor.close()
    if topology.rank == 0:
        run_folder.write_exit(run_dir, code, reason)
        follow_up = "the same command goes on" if code else f"python -m trainer.export run_dir={run_dir}"
        say(f"{reason}; run folder {run_dir}; next: {follow_up}")
    dist.barrier()
    return code


def run_steps(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    topology: Topology,
    monitor: Monitor | None,
    stop: StopRequest,
    attempt: int,
) -> tuple[int, str]:
    """Set up, resume, and step until something says stop: (exit code, reason)."""
    run_dir = Path(config.run_dir)
    checkpoint, begun = find_checkpoint(config, topology)
    from_rank_0(topology, lambda: bool(open_indexes(config.data, build_missing=True, begun=begun)))
    indexes = open_indexes(config.data, build_missing=False, begun=begun)
    order = fingerprint(config.data, indexes, tokenizer, config.model.causal_transformer.num_queries)
    engine = build_engine(config, topology)
    sources = list(indexes)
    state = resume(checkpoint, config, engine, order, sources, topology) if checkpoint else TrainState()
    if not checkpoint and config.init.weights:
        load_imported(Path(config.init.weights), engine, topology)
    if monitor is not None and not checkpoint:
        for sentence in doubtful(config):
            log.warning("%s", sentence)
    if monitor is not None:
        run_folder.keep_tokenizer(run_dir, tokenizer)
        monitor.start(state.step, config.total_steps, topology.world_size, engine.device.type)
        if state.changes:
            monitor.order_changed(state.step, state.changes)
    stream = iter(make_loader(config, indexes, tokenizer, topology, state.cursors))
    epoch_sizes = {name: index.num_samples for name, index in indexes.items()}
    job = Job(config, engine, stream, state, topology, monitor, epoch_sizes)
    writer = CheckpointWriter(run_dir, topology)

    def begin(permanent: bool) -> None:
        begin_save(writer, config, engine, state, order, sources, topology, permanent)

    first_step = state.step
    last_step = min(config.total_steps, config.stop_after_step or config.total_steps)
    saver = Saver(run_dir, config.checkpoint, topology, writer, begin, job.tell, first_step)
    hangs = run_dir / "hang" / f"attempt-{attempt}"
    watchdog = Watchdog(run_dir, hangs, topology, job.instruments.phases, 60 * config.guard.hang_minutes)
    step_until(last_step, stop, job, saver, HeldOut(config, indexes, tokenizer, topology), watchdog)
    saver.last(state.step)
    if state.step < last_step:
        code, reason = STOPPED_BY_SIGNAL, f"stopped {stop.reason} after step {state.step}"
    else:
        code, reason = 0, f"trained from step {first_step} to {state.step} of {config.total_steps}"
    job.tell("stop", state.step, reason=reason)
    return code, reason


def make_loader(
    config: PretrainConfig,
    indexes: dict[str, Index],
    tokenizer: Tokenizer,
    topology: Topology,
    cursors: dict[int, Cursor],
) -> Loader:
    """Micro-batches of this rank from where its lanes go on."""
    return Loader(
        config.data,
        indexes,
        tokenizer,
        num_queries=config.model.causal_transformer.num_queries,
        image_size=config.model.vision.image_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        tp_rank=topology.tp_rank,
        tp_size=topology.tp_size,
        cursors=cursors,
        unreachable_log=Path(config.run_dir, "unreachable.jsonl") if topology.tp_rank == 0 else None,
    )


def step_until(
    last_step: int, stop: StopRequest, job: Job, saver: Saver, held_out: HeldOut, watchdog: Watchdog
) -> None:
    """Train, save and validate until last_step, or until any rank is asked to stop; go back where steps are no good."""
    config, state, topology, phases = job.config, job.state, job.topology, job.instruments.phases
    profiler, is_asked = Profiler(Path(config.run_dir), topology.rank, config.monitor.profile_step), False
    with watchdog:
        while state.step < last_step and not is_asked:
            with profiler.around(state.step + 1):
                is_asked, is_writing = one_step(job, lambda: (stop.is_asked(), saver.is_writing))
            watchdog.beat()
            with phases("checkpoint"):
                saver.poll(is_writing)
                if state.bad_steps >= config.guard.patience:
                    watchdog.rest()  # it reads a whole checkpoint; parallel.timeout_minutes holds
                    saver.conclude()
                    back = roll_back(config, job.engine, state, topology)
                    job.tell("rollback", state.step, to_step=back, passed_over=[back + 1, state.step])
                saver.after_step(state.step, is_good=state.bad_steps == 0)
            watchdog.beat()
            if due(state.step, config.validation.every_steps):
                with phases("validation"):
                    run_validation(job.engine, held_out, job.monitor, state.step)
                watchdog.beat()


@hydra.main(config_path=CONF_DIR, config_name="pretrain", version_base="1.3")
def hydra_main(composed: DictConfig) -> None:
    run_cli(lambda: train(to_dataclass(composed)))


def main() -> None:
    quiet_libraries()
    # The bare DeepSpeed launcher adds --local_rank, which Hydra does not know; the environment says it as well.
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]
    if not any(argument.startswith("-") for argument in sys.argv[1:]):
        try:
            check(sys.argv[1:])
        except UserError:
            if int(os.environ.get("RANK", "0")) > 0:  # every rank finds the same: one sentence is enough
                time.sleep(SPEAKING_S)
                sys.exit(2)
            raise
    register_schemas()
    hydra_main()


if __name__ == "__main__":
    run_cli(main)
