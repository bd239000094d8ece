"""When a run saves: at its intervals while training goes on, at its end, and again where a save has failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from conf import UserError
from trainer.checkpoint_folder import prune
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import CheckpointConfig
from trainer.state import due, from_rank_0
from trainer.topology import Topology

log = logging.getLogger(__name__)

RETRY_STEPS = 20
"""So many steps after the step of a save that failed, the next one is tried, or when its failure shows."""
LAST_TRIES, LAST_PAUSE_S = 4, 15.0
"""Tries of the save at the end of a run, and the pause before each further one."""


class Saver:
    """All ranks call its methods in the same order, with the same steps.

    begin: starts a checkpoint of the step it is called at, a permanent one or not. tell: records an event (kind, step,
    facts).
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        topology: Topology,
        writer: CheckpointWriter,
        begin: Callable[[bool], None],
        tell: Callable[..., None],
        step: int,
    ) -> None:
        self._run_dir, self._config, self._topology = run_dir, config, topology
        self._writer, self._begin, self._tell = writer, begin, tell
        self._saved_step = self._begun_step = step
        self._begun_permanent = False
        self._is_due = self._owes_permanent = False
        self._retry_at = 0

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files of a checkpoint are not yet written."""
        return self._writer.is_writing

    def after_step(self, step: int, is_good: bool = True) -> None:
        """Begin a checkpoint if one is due. Waits for the one before if that is still being written.

        is_good: false in a row of steps that were thrown away, where the checkpoint waits for the next good one: it
        would take the place of one that a rollback needs.
        """
        is_permanent = due(step, self._config.permanent_every_steps)
        self._owes_permanent |= is_permanent
        self._is_due |= is_permanent or due(step, self._config.every_steps) or 0 < self._retry_at <= step
        if self._is_due and is_good:
            self.conclude()
            self._start(step)
            if not self._config.background:
                self.conclude()

    def poll(self, is_writing: bool) -> None:
        """is_writing: whether any rank still writes. Makes a checkpoint that is written the latest."""
        if not is_writing:
            self.conclude()

    def last(self, step: int) -> None:
        """Leave a checkpoint of the last step. UserError if it cannot be written."""
        self.conclude()
        for number in range(1, LAST_TRIES + 1):
            if self._saved_step == step:
                return
            if number > 1:
                time.sleep(LAST_PAUSE_S)
            self._start(step, is_last=number == LAST_TRIES)
            self.conclude(is_last=number == LAST_TRIES)

    def _start(self, step: int, is_last: bool = False) -> None:
        self._begun_step, self._begun_permanent = step, self._owes_permanent
        self._is_due, self._owes_permanent, self._retry_at = False, False, 0
        self._attempt(lambda: self._begin(self._begun_permanent), is_last)

    def conclude(self, is_last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._writer.in_flight:
            self._attempt(self._finish, is_last)

    def _finish(self) -> None:
        path = self._writer.finish()
        self._saved_step = self._begun_step
        self._tell("checkpoint", self._begun_step, path=path.name)
        from_rank_0(self._topology, lambda: prune(self._run_dir, self._config.keep))

    def _attempt(self, action: Callable[[], None], is_last: bool) -> None:
        """A save that fails harms neither the run nor the checkpoints before it."""
        try:
            action()
        except UserError as error:
            if is_last:
                raise
            self._retry_at = self._begun_step + RETRY_STEPS
            self._owes_permanent |= self._begun_permanent
            self._tell("checkpoint_failed", self._begun_step, reason=str(error))
            if self._topology.rank == 0:
                log.warning("%s; trying again", error)
