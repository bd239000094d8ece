"""One page that shows what the demo did: ``python -m benchmarks.demo.report --out outputs/demo``.

Everything is read from the files of the demo; the page needs nothing but itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.demo.check import read_answers
from benchmarks.demo.examples import caption_examples, retrieval_examples
from benchmarks.demo.packed_rows import RowSample, read_rows
from conf import UserError, run_cli
from data_pipelines.inspecting.packed_rows import ShownRow
from data_pipelines.inspecting.templates import template_environment
from models.weights.fragment_files import FragmentReader
from trainer.checkpoint import read_state
from trainer.checkpoint_folder import find_latest
from trainer.config import PretrainConfig
from trainer.monitor import read_metrics
from trainer.reporting.charts import TEMPLATES, Chart, Curve, Drawing, Level, Mark, draw
from trainer.reporting.panels import ALL_SOURCES

COLOURS = ("#2f6db3", "#d97b29", "#2e9662", "#8a5cc2", "#c24d57", "#6b7a87")
STEPS_LOOKED_AT = 8
LIBRARIES = ("torch", "deepspeed", "megatron-core", "webdataset", "transformers")

Records = Sequence[Mapping[str, Any]]


def build(out: Path) -> str:
    """The page. UserError if the demo has not come so far."""
    run_dir = out / "run"
    checkpoint = find_latest(run_dir)
    if checkpoint is None:
        raise UserError(f"{run_dir} has no checkpoint: run python -m benchmarks.demo.run --out {out} first")
    saved = read_state(checkpoint)
    config = saved_config(saved.state["config"])
    records = read_metrics(run_dir)
    answers = read_answers(out)["heldout"]
    figures = read_json(out / "predictions" / "figures.json")
    resume = read_json(out / "resume.json")
    sources = dict(zip(config.data.sources, COLOURS, strict=False))
    rows = read_rows(config, STEPS_LOOKED_AT)
    heldout = out / "corpora" / "heldout"
    return render(
        figures=figures,
        headline=headline(figures["heldout"]),
        captions=caption_examples(answers, heldout),
        retrieval=retrieval_examples(answers, heldout),
        rows=rows,
        seq_len=config.data.seq_len,
        sources=sources,
        charts=all_charts(records, sources, config, resume["resumed_from"]),
        confusions=figures["heldout"]["confusion"],
        mixture=mixture(config, records, rows),
        skips=saved.state["skips"],
        resume=resume,
        facts=run_facts(config, records, checkpoint),
        stages=read_json(out / "stages.json"),
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def saved_config(content: dict[str, Any]) -> PretrainConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PretrainConfig), content))
    assert isinstance(config, PretrainConfig)
    return config


def headline(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"title": "of colours, shapes and places in captions are right", **figures["attributes"]["all"]},
        {"title": "of captions are exact: every object, every attribute, nothing else", **figures["exact"]},
        {
            "title": f"of texts find their own image among {figures['retrieval_group']}",
            **figures["retrieval"],
        },
    ]


def all_charts(records: Records, sources: dict[str, str], config: PretrainConfig, resumed_at: int) -> list[Drawing]:
    """sources: name -> colour."""
    resumed = [Mark(resumed_at, "start", f"resumed from step {resumed_at}")]
    charts = [
        Chart("Text loss", loss_curves(records, "text", sources), "cross-entropy, nats", log=True, marks=resumed),
        Chart("Image loss", loss_curves(records, "image", sources), "squared error", log=True, marks=resumed),
        Chart(
            "Explained variance",
            [
                curve(records, "explained_variance_first", "first slot", COLOURS[0]),
                curve(records, "explained_variance_later", "later slots", COLOURS[1]),
            ],
            y_range=(-0.5, 1.0),
            marks=resumed,
        ),
        Chart(
            "Spread across images",
            [curve(records, "embedding_spread", "visual embeddings", COLOURS[2])],
            log=True,
            levels=[Level(config.monitor.collapse_spread, "var(--bad)", "collapse alarm")],
            marks=resumed,
        ),
        Chart(
            "Effective rank",
            [curve(records, "effective_rank", "visual embeddings", COLOURS[3])],
            marks=resumed,
        ),
        Chart(
            "Gradient norm before clipping",
            [curve(records, "grad_norm", "all parameters", COLOURS[5])],
            log=True,
            levels=[Level(config.optim.grad_clip, "var(--bad)", "clipped at")],
            marks=resumed,
        ),
    ]
    return [draw(chart) for chart in charts]


def loss_curves(records: Records, modality: str, sources: dict[str, str]) -> list[Curve]:
    by_source = [curve(records, f"loss/{modality}/{name}", name, colour) for name, colour in sources.items()]
    return [*by_source, curve(records, f"loss/{modality}", ALL_SOURCES, "var(--ink)")]


def curve(records: Records, metric: str, name: str, colour: str) -> Curve:
    """The steps whose record has a number of the metric."""
    found = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    return Curve(name, [step for step, _ in found], [value for _, value in found], colour, name == ALL_SOURCES)


def mixture(config: PretrainConfig, records: Records, rows: RowSample) -> list[dict[str, Any]]:
    """Per source, what was asked for and what came: shares of documents, text targets and image targets."""
    asked = {name: source.weight for name, source in config.data.sources.items()}
    columns = {
        "weight": shares(asked),
        "documents": shares(rows.documents),
        "text_targets": shares(total_by_source(records, "text", asked)),
        "image_targets": shares(total_by_source(records, "image", asked)),
    }
    return [
        {"source": source, "kind": settings.kind, **{name: share.get(source, 0.0) for name, share in columns.items()}}
        for source, settings in config.data.sources.items()
    ]


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = max(sum(counts.values()), 1e-9)
    return {name: count / total for name, count in counts.items()}


def total_by_source(records: Records, modality: str, sources: Mapping[str, float]) -> Counter[str]:
    return Counter({name: sum(record.get(f"targets/{modality}/{name}", 0) for record in records) for name in sources})


def run_facts(config: PretrainConfig, records: Records, checkpoint: Path) -> dict[str, str]:
    num_parameters = sum(math.prod(shape) for shape in FragmentReader(checkpoint).shapes().values())
    total = {
        name: sum(record[name] for record in records)
        for name in ("tokens", "text_targets", "images", "seconds/step", "seconds/data_wait")
    }
    seconds = total["seconds/step"]
    waited = total["seconds/data_wait"]
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    return {
        "model": f"{config.model.name}, {num_parameters / 1e6:.2f} million parameters",
        "steps": f"{len(records):,} of {config.data.global_batch_rows} rows of {config.data.seq_len} positions",
        "tokens": f"{total['tokens']:,}, of them {total['text_targets']:,} text targets",
        "images": f"{total['images']:,}",
        "time": f"{seconds:.0f} s in steps, {seconds / len(records):.2f} s each; {waited:.0f} s of it waiting for data",
        "layout": f"2 processes, ZeRO stage {config.parallel.zero_stage}, {config.parallel.precision}",
        "objective": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(config.objective).items()),
        "machine": machine(),
        "software": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def machine() -> str:
    """Processor, cores and memory."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {gigabytes:.0f} GB"


def render(sources: dict[str, str], **content: Any) -> str:
    """sources: name -> colour."""
    template = template_environment(Path(__file__).parent, TEMPLATES).get_template("report.html.j2")
    return template.render(sources=sources, colours_of=partial(colours_of, sources=sources), **content)


def colours_of(row: ShownRow, sources: Mapping[str, str]) -> list[str]:
    return [sources[document.key.source] for document in row.documents]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of the demo (%(default)s)")
    out = parser.parse_args().out
    path = out / "report.html"
    path.write_text(build(out), encoding="utf-8")
    print(f"report: {path} ({path.stat().st_size / 2**20:.1f} MB); next: open it in a browser")


if __name__ == "__main__":
    run_cli(main)
