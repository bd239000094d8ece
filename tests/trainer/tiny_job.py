"""Jobs small enough for tests: corpora of a few pixels, a model of a few thousand weights, and their command lines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.ports import free_port
from tests.data_pipelines.corpora import write_pairs, write_texts
from trainer.monitor import DIFFERS, read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300

SOURCES = [
    *(f"data.sources.{name}.weight=0" for name in ("laion_coco", "webvid", "storyboard")),
    "data.sources.mmc4.kind=text",  # pages without pictures
    "data.sources.laion.holdout=0.1",
]
MODEL = [
    "model=emu_tiny",
    "model.vision={image_size: 8, patch_size: 4, width: 16, num_layers: 2, num_heads: 2, mlp_width: 24}",
    "model.causal_transformer={num_queries: 3, width: 16, num_layers: 2, num_heads: 2, head_width: 8, mlp_width: 24}",
    "model.language_model={width: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, mlp_width: 48}",
]
SIZES = [
    "data.seq_len=64",
    "data.max_images_per_row=4",
    "data.global_batch_rows=8",
    "data.micro_batch_rows=2",
    "data.lanes=4",
    "data.window_rows=6",
    "data.chunk_samples=8",
    "data.num_workers=0",
    "parallel.threads=1",
    "parallel.deterministic=true",
    "parallel.timeout_minutes=1",
    "monitor.log_every_steps=1",
    "monitor.wandb=disabled",
]


def write_corpora(folder: Path) -> None:
    """A folder for EMU_DATA with pairs under laion/, texts under mmc4/; some captions and pictures are broken."""
    for source in ("laion", "mmc4"):
        (folder / source).mkdir(parents=True)
    write_pairs(folder / "laion" / "00000.tar", 0, 30)
    write_pairs(folder / "laion" / "00001.tar", 30, 13)
    write_texts(folder / "mmc4" / "00000.tar", 0, 25)


def overrides(folder: Path, tokenizer: Path, run_dir: Path, *more: str) -> list[str]:
    """A command line for 8 steps on `write_corpora(folder)`; later overrides win."""
    places = [
        f"data.tokenizer={tokenizer}",
        f"data.index_dir={folder / 'index'}",
        f"run_dir={run_dir}",
        "total_steps=8",
    ]
    return [*MODEL, *SOURCES, *SIZES, *places, *more]


def environment(**changes: str) -> dict[str, str]:
    """One thread, no launcher's variables, and the repository importable from anywhere."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "EMU_DATA", "EMU_LAUNCHER_PID")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | changes


def run_command(
    module: str, arguments: list[str], cwd: Path, timeout_s: float = TIMEOUT_S, **env: str
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` with `env` on top of the environment."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, env=environment(**env), cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def start_ranks(
    world_size: int, arguments: list[str], data: Path, job: Sequence[str] = ("-m", "trainer.pretrain")
) -> list[subprocess.Popen[str]]:
    """`python -m trainer.pretrain arguments` as a launcher starts it, each rank in a session of its own."""
    group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *job, *arguments]
    return [
        subprocess.Popen(
            command,
            env=environment(EMU_DATA=str(data), DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), **group),
            cwd=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and outputs; nothing is left running."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def history(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs between equal runs: times, memory, and the number of the attempt."""
    return [
        {name: value for name, value in record.items() if not name.startswith(DIFFERS)}
        for record in read_metrics(run_dir)
    ]


def final_state(run_dir: Path, step: int) -> dict[str, Any]:
    """Bytes of the fragments of a checkpoint (weights and moments), and its state without the configuration."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    state = json.loads((folder / "state.json").read_text())
    del state["state"]["config"]
    ranks = {path.name: path.read_bytes() for path in folder.glob("*") if path.name.startswith(("fragments", "rank"))}
    assert ranks
    return {**ranks, "state": state}
