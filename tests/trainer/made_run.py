"""A run folder as a run would leave it, without a run: every metric, event and file that a report can show."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

SOURCES = ("laion", "mmc4", "webvid")
MODULES = ("vision_encoder", "causal_transformer", "language_model", "text_head", "regression_head")
GROUPS = ("vision_encoder", "causal_transformer", "language_model")
START_S = 1_760_000_000.0
CONFIG = """\
run_dir: outputs/made
total_steps: 1000
optim: {grad_clip: 5.0}
monitor: {collapse_spread: 0.02, log_every_steps: 10}
data:
  sources:
    laion: {kind: laion, weight: 6.0}
    mmc4: {kind: mmc4, weight: 3.0}
    webvid: {kind: webvid, weight: 1.0}
"""


def step_line(attempt: int, step: int, **values: Any) -> dict[str, Any]:
    """All that metrics.jsonl has of a step. values: take the place of the made ones."""
    noise = random.Random(step * 31 + attempt)
    text, image = 3.5 + 7 * math.exp(-step / 150), 0.1 + 0.4 * math.exp(-step / 300)
    seconds = {"data_wait": 0.03, "forward": 0.4, "backward": 0.8, "optimizer": 0.15}
    seconds = {name: value * noise.uniform(0.9, 1.1) for name, value in seconds.items()}
    seconds["checkpoint"] = 0.5 if step % 100 == 1 else 0.0
    total = sum(seconds.values()) + 0.02
    line: dict[str, Any] = {
        "attempt": attempt,
        "step": step,
        "time": START_S + 1000 * attempt + step * 1.5,
        "loss/text": text * noise.gauss(1, 0.02),
        "loss/image": image * noise.gauss(1, 0.03),
        "perplexity": math.exp(text),
        "explained_variance_first": 0.6 - 2 * math.exp(-step / 100) + noise.gauss(0, 0.03),
        "explained_variance_later": 0.8 - 2 * math.exp(-step / 80) + noise.gauss(0, 0.03),
        "embedding_spread": 0.5 + noise.gauss(0, 0.02),
        "embedding_rms": 0.24,
        "embedding_std_per_slot": [0.1, 0.2],
        "effective_rank": 12 + step / 100,
        "grad_norm": 2.5 * noise.lognormvariate(0, 0.3),
        "tokens": 4096 + noise.randrange(100),
        "images": 64 + noise.randrange(8),
        "tokens_per_second": 4096 / total,
        "images_per_second": 64 / total,
        "flops_per_second": 4.1e14,
        "mfu": 0.41,
        "seconds/step": total,
        "memory/host_gb": 8.0 + step / 1000,
        "memory/device_gb": 61.5,
        "token_fill": 0.97,
        "image_fill": 0.6,
    }
    line |= {f"seconds/{name}": value for name, value in seconds.items()}
    line |= {f"grad_norm/{name}": noise.lognormvariate(0, 0.3) for name in MODULES}
    line |= {f"lr/{name}": 1e-4 / (n + 1) * min(1, step / 200) for n, name in enumerate(GROUPS)}
    for number, name in enumerate(SOURCES):
        line |= {
            f"loss/text/{name}": text * (1 + number / 5) * noise.gauss(1, 0.05),
            f"loss/image/{name}": image * (1 + number / 4) * noise.gauss(1, 0.05),
            f"targets/text/{name}": 1000 // (number + 1),
            f"targets/image/{name}": 300 // (number + 1),
        }
    if step % 10 == 0:
        line |= counts(step)
    return line | values


def counts(step: int) -> dict[str, Any]:
    samples = {name: step * 64 * weight // 10 for name, weight in zip(SOURCES, (6, 3, 1), strict=True)}
    return {
        "samples": samples,
        "skips": {"laion: empty caption": step // 5, "mmc4: picture cannot be decoded": step // 20},
        **{f"mixture/{name}": samples[name] / (64 * step) for name in SOURCES},
        **{f"epoch/{name}": samples[name] / 40_000 for name in SOURCES},
    }


def write_lines(path: Path, records: Sequence[dict[str, Any]], end: str = "\n") -> None:
    """end: of the last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(record) for record in records) + end)


def write_run(folder: Path, steps: int = 600) -> Path:
    """Two attempts, the second from 3/5 of the way; still running. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    begun, reached = steps * 3 // 5, steps * 2 // 3
    (folder / "config.yaml").write_text(CONFIG)
    write_lines(folder / "metrics.jsonl", [step_line(1, step) for step in range(1, reached + 1)])
    write_lines(folder / "metrics.jsonl", [step_line(2, step) for step in range(begun + 1, steps + 1)])
    write_lines(folder / "events.jsonl", made_events(begun, steps))
    write_lines(folder / "validation.jsonl", [validation_line(step) for step in range(0, steps + 1, 10)])
    write_samples(folder / "samples" / f"step-{steps:08d}")
    (folder / "checkpoints" / f"step-{begun:08d}").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text(f"step-{begun:08d}\n")
    return folder


def made_events(begun: int, steps: int) -> list[dict[str, Any]]:
    discarded = {
        "event": "step_discarded",
        "reason": "the loss is not finite",
        "rank": 3,
        "keys": [["laion", 17, 4]],
    }
    return [
        {"attempt": 1, "step": 0, "event": "start", "world_size": 8, "device": "cuda"},
        {"attempt": 1, "step": begun, "event": "checkpoint", "path": f"checkpoints/step-{begun:08d}"},
        {"attempt": 2, "step": begun, "event": "start", "world_size": 8, "device": "cuda"},
        {"attempt": 2, "step": begun + 5, **discarded},
        {"attempt": 2, "step": steps - 5, "event": "rollback", "to_step": begun, "passed_over": [begun + 1, steps - 5]},
    ]


def validation_line(step: int) -> dict[str, Any]:
    by_source = {
        f"loss/{kind}/{name}": 4 - step / 500 + n / 9 for kind in ("text", "image") for n, name in enumerate(SOURCES)
    }
    totals = {"loss/text": 4.1 - step / 500, "loss/image": 0.3, "retrieval_at_1": step / 1000, "retrieval_of": 32}
    return {"attempt": 1, "step": step, **totals, **by_source}


def write_samples(folder: Path, generated: str = "a red circle") -> None:
    folder.mkdir(parents=True)
    entries = []
    for number, colour in enumerate(("red", "green", "blue")):
        PIL.Image.new("RGB", (64, 48), colour).save(folder / f"{number}.png")
        truth = f"a {colour} picture"
        entries.append({"image": f"{number}.png", "source": SOURCES[number], "truth": truth, "generated": generated})
    (folder / "samples.json").write_text(json.dumps(entries))
