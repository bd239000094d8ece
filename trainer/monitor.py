"""What a run tells: a line per step in metrics.jsonl, wandb (offline unless asked otherwise), a line on the console."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

from trainer.config import MonitorConfig
from trainer.guards import Problem

log = logging.getLogger(__name__)
RECOVERY = 1.5
"""A collapse is over at so many times its limit: noise around the limit must not ring at every step."""
COLLAPSE = (
    "step %d: collapse alarm, the visual embeddings of different images are alike (spread %.4f): a falling regression "
    "loss means nothing now; lower the learning rates, or train with objective=from_scratch"
)
DIFFERS = ("attempt", "time", "seconds/", "memory/", "tokens_per_", "images_per_", "flops_per_", "mfu")
"""How the names begin of what two runs that are equal bit for bit record differently."""
CONSOLE_VALIDATION = ("loss/text", "loss/image", "retrieval_at_1", "retrieval_of")
CONSOLE = ("loss/text", "loss/image", "explained_variance_first", "embedding_spread", "grad_norm")


class Monitor:
    """Rank 0's record of the run. Every line of metrics.jsonl carries (attempt, step); of a step written twice, by two
    attempts, the later attempt's line counts (`read_metrics`)."""

    def __init__(self, run_dir: Path, config: MonitorConfig, resolved_config: dict[str, Any], attempt: int) -> None:
        self.config = config
        self.attempt = attempt
        self.collapsed = False
        self.metrics = LineFile(run_dir / "metrics.jsonl")
        self.events = LineFile(run_dir / "events.jsonl")
        self.validations = LineFile(run_dir / "validation.jsonl")
        self.wandb = start_wandb(run_dir, config, resolved_config)
        self.started = (time.monotonic(), 0)

    def start(self, step: int, total_steps: int, world_size: int, device: str) -> None:
        self.event("start", step, world_size=world_size, device=device)
        self.started = (time.monotonic(), step)
        say(f"attempt {self.attempt}: from step {step} of {total_steps} on {world_size} x {device}")

    def order_changed(self, step: int, changes: list[str]) -> None:
        self.event("order_changed", step, changes=changes)
        log.warning("from step %d on the data order is another: %s", step + 1, "; ".join(changes))

    def step(self, step: int, total_steps: int, values: dict[str, Any]) -> None:
        self.metrics.write({"attempt": self.attempt, "step": step, "time": time.time(), **values})
        if "embedding_spread" in values:
            self.watch_collapse(step, values["embedding_spread"])
        if step % self.config.log_every_steps:
            return
        shown = "  ".join(f"{name} {values[name]:.4f}" for name in CONSOLE if values.get(name) is not None)
        left = self.time_left(step, total_steps)
        say(f"step {step}/{total_steps}  {shown}  {values['seconds/step']:.2f} s, {left} left")
        self.send(flat(values), step)

    def time_left(self, step: int, total_steps: int) -> str:
        """At the mean pace of this attempt, checkpoints and all."""
        began, first_step = self.started
        seconds = (time.monotonic() - began) / max(1, step - first_step) * (total_steps - step)
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"

    def send(self, values: dict[str, Any], step: int) -> None:
        """To wandb, whose failure must not end the run."""
        if self.wandb is None:
            return
        try:
            self.wandb.log(values, step=step)
        except Exception as error:
            log.warning("wandb is off from here on (%s); metrics.jsonl has everything", error)
            self.wandb = None

    def validation(self, step: int, values: dict[str, Any], samples: Path | None = None) -> None:
        """A line of validation.jsonl. samples: folder that `write_samples` made, for wandb."""
        self.validations.write({"attempt": self.attempt, "step": step, **values})
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in CONSOLE_VALIDATION if name in values)
        say(f"validation at step {step}: {shown}")
        self.send({f"validation/{name}": value for name, value in values.items()}, step)
        if samples is not None and self.wandb is not None:
            self.send({"validation/samples": _wandb_images(samples)}, step)

    def event(self, kind: str, step: int, **facts: Any) -> None:
        self.events.write({"attempt": self.attempt, "step": step, "event": kind, **facts})

    def discarded(self, step: int, problem: Problem, keys: list[Any]) -> None:
        """keys: of the samples that the first of the problem's ranks was training on."""
        self.event("step_discarded", step, reason=problem.reason, ranks=list(problem.ranks), keys=keys)
        where = f" on rank {', '.join(map(str, problem.ranks))}" if problem.ranks else ""
        log.warning("step %d was thrown away: %s%s", step, problem.reason, where)

    def watch_collapse(self, step: int, spread: float) -> None:
        """One alarm when the embeddings fall together, one message when they are clearly apart again."""
        limit = self.config.collapse_spread * (RECOVERY if self.collapsed else 1.0)
        if (spread < limit) == self.collapsed:
            return
        self.collapsed = not self.collapsed
        self.event("collapse" if self.collapsed else "recovery", step, embedding_spread=spread)
        log.warning(
            COLLAPSE if self.collapsed else "step %d: the visual embeddings differ again (spread %.4f)", step, spread
        )

    def close(self) -> None:
        self.metrics.close()
        self.events.close()
        self.validations.close()
        if self.wandb is not None:
            with contextlib.suppress(Exception):
                self.wandb.finish()


def say(line: str) -> None:
    """On the console, whose loss must not end the run: a terminal that is closed, a log on a full disk."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """What wandb draws: numbers by name, those of a dict as name/key; lists and what is missing are left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": number for key, number in value.items()}
        elif value is not None and not isinstance(value, list):
            found[name] = value
    return found


class LineFile:
    """A file of JSON lines to append to, each written at once. A full disk costs lines, told once, and not the run."""

    def __init__(self, path: Path) -> None:
        self._path, self._is_whole, self._is_told = path, True, False
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size:  # a kill may have left half a line
            self._is_whole = os.pread(self._descriptor, 1, size - 1) == b"\n"

    def write(self, record: dict[str, Any]) -> None:
        line = ("" if self._is_whole else "\n") + json.dumps(record) + "\n"
        content = line.encode()
        try:
            self._is_whole = os.write(self._descriptor, content) == len(content)
        except OSError as error:
            self._is_whole = False
            if not self._is_told:
                log.warning("%s: lines are lost (%s)", self._path, error.strerror)
            self._is_told = True

    def close(self) -> None:
        os.close(self._descriptor)


def _wandb_images(folder: Path) -> list[Any]:
    """Pictures with both captions; none if wandb cannot take them: it never stops a run."""
    try:
        import wandb

        return [
            wandb.Image(str(folder / sample["image"]), caption=f"{sample['generated']} (truth: {sample['truth']})")
            for sample in json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        ]
    except Exception as error:
        log.warning("wandb does not take the sample pictures (%s); they are in %s", error, folder)
        return []


def start_wandb(run_dir: Path, config: MonitorConfig, resolved_config: dict[str, Any]) -> Any | None:
    """wandb's handle, the same run id through all attempts; None if it is off or fails: it never stops a run."""
    if config.wandb == "disabled":
        return None
    try:
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.exists() or not id_file.stat().st_size:
            id_file.write_text(secrets.token_hex(4))
        return wandb.init(
            project=config.wandb_project,
            id=id_file.read_text().strip(),
            resume="allow" if config.wandb == "online" else None,
            mode="online" if config.wandb == "online" else "offline",
            dir=str(run_dir),
            config=resolved_config,
            settings=wandb.Settings(silent=True, x_disable_stats=True, init_timeout=60, x_disable_meta=True),
        )
    except Exception as error:
        log.warning("wandb is off for this attempt (%s); metrics.jsonl has everything", error)
        return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The surviving history: one record a step, by step, from the last attempt that reached it."""
    last: dict[int, dict[str, Any]] = {}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a line cut by a kill
            continue
        if record["attempt"] >= last.get(record["step"], record)["attempt"]:
            last[record["step"]] = record
    return [last[step] for step in sorted(last)]


def quiet_libraries() -> None:
    """Keep start-up chatter of libraries off the console; warnings stay."""
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
