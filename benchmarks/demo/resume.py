"""Whether a run that was interrupted and resumed did the same again: computed from its files, bit for bit."""

from __future__ import annotations

import filecmp
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.monitor import DIFFERS


@dataclass(frozen=True)
class RepeatedStep:
    """One step. digests: of its sample keys, by attempt. differences: names of values that the attempts recorded and
    that are not equal in every bit."""

    step: int
    text_loss: float | None
    digests: dict[int, int]
    differences: list[str]

    @property
    def exact(self) -> bool:
        return len(self.digests) > 1 and not self.differences


@dataclass(frozen=True)
class ResumeCheck:
    """fragment_files: equal byte for byte or not, by name: weights and Adam's moments of each rank."""

    resumed_from: int
    steps: list[RepeatedStep]
    fragment_files: dict[str, bool]

    @property
    def exact(self) -> bool:
        """Everything that was compared is equal, and something was."""
        parts = [[step.exact for step in self.steps], list(self.fragment_files.values())]
        return all(part and all(part) for part in parts)

    def to_json(self) -> dict[str, Any]:
        return {"exact": self.exact, **asdict(self)}


def check_resume(
    metrics: Path, first_checkpoint: Path, second_checkpoint: Path, resumed_from: int, stop: int
) -> ResumeCheck:
    """Compare all attempts' records of the steps (resumed_from, stop], and two attempts' checkpoints of step `stop`."""
    lines = read_lines(metrics)
    steps = [
        compare_step(step, [line for line in lines if line["step"] == step])
        for step in range(resumed_from + 1, stop + 1)
    ]
    return ResumeCheck(resumed_from, steps, compare_fragments(first_checkpoint, second_checkpoint))


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    lines = []
    for line in metrics.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # cut by a kill
            lines.append(json.loads(line))
    return lines


def compare_step(step: int, lines: list[dict[str, Any]]) -> RepeatedStep:
    """Every value but times and what follows from them. Numbers are compared as written, so that NaN equals NaN."""
    names = sorted({name for line in lines for name in line if not name.startswith(DIFFERS)})
    differences = [name for name in names if len({json.dumps(line.get(name, "absent")) for line in lines}) > 1]
    text_loss = lines[0]["loss/text"] if lines else None
    return RepeatedStep(step, text_loss, {line["attempt"]: line["digest"] for line in lines}, differences)


def compare_fragments(first: Path, second: Path) -> dict[str, bool]:
    """Whether each file of weights and moments of one checkpoint is the other's, byte for byte."""
    folders = (first, second)
    names = sorted({path.name for folder in folders for path in folder.glob("fragments-*.safetensors")})
    return {
        name: all((folder / name).is_file() for folder in folders)
        and filecmp.cmp(first / name, second / name, shallow=False)
        for name in names
    }
