"""Findings on the terminal: tables, histograms as bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipelines.inspecting.bench import STAGES, Speed
from data_pipelines.inspecting.info import Histogram, MixtureInfo, SourceInfo
from data_pipelines.inspecting.lint import DUPLICATE, Findings

SENTENCES_SHOWN = 20
HELD_OUT = "held out (not skipped: usable for validation)"
TITLES = {
    "tokens": "tokens a document",
    "images": "images a document",
    "short side": "shorter side of images, pixels",
    "aspect ratio": "width / height of images",
}


def table(title: str, *columns: str, text_columns: int = 1) -> Table:
    """The first columns are text, the others numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < text_columns else "right", overflow="fold")
    return made


def show_lint(findings: Mapping[str, Findings], console: Console) -> None:
    counts = table("sources", "source", "shards", "samples", "usable", "skipped", "decoded", "undecodable", "broken")
    reasons = table("what is left out and why", "source", "reason", "examples", "samples", text_columns=3)
    for name, found in findings.items():
        left_out = Counter({HELD_OUT: found.num_held_out, DUPLICATE: found.num_duplicates})
        left_out += found.skips + found.undecodable
        numbers = (found.num_samples, found.num_documents, found.skips.total(), found.num_decoded)
        problems = (found.undecodable.total(), len(found.broken))
        counts.add_row(name, *(f"{number:,}" for number in (found.num_shards, *numbers, *problems)))
        for reason, number in left_out.most_common():
            examples = (f"{short(shard)}: {key}" for shard, key in found.examples.get(reason, []))
            reasons.add_row(name, reason, escape("\n".join(examples)), f"{number:,}")
    console.print(counts)
    if reasons.row_count:
        console.print("", reasons)
    for name, found in findings.items():
        show_sentences(f"[red]broken[/red] {name}", found.broken, console)
        show_sentences(f"[yellow]remark[/yellow] {name}", found.remarks, console)


def show_sentences(label: str, sentences: Sequence[str], console: Console) -> None:
    for sentence in sentences[:SENTENCES_SHOWN]:
        console.print(f"{label}: {escape(sentence)}", soft_wrap=True)
    if len(sentences) > SENTENCES_SHOWN:
        console.print(f"{label}: and {len(sentences) - SENTENCES_SHOWN} more (--json has them all)")


def short(url: str) -> str:
    """The last folder and the file."""
    return "/".join(url.split("/")[-2:])


def show_info(sources: Mapping[str, SourceInfo], mixture: MixtureInfo, console: Console) -> None:
    columns = ("kind", "shards", "samples", "GiB", "usable", "cut", "tokens each", "images each")
    totals = table("sources", "source", *columns, text_columns=2)
    for name, info in sources.items():
        share = info.num_documents / max(1, info.num_looked_at)
        means = (f"{info.histograms[of].mean:.1f}" for of in ("tokens", "images"))
        totals.add_row(name, info.kind, f"{info.num_shards:,}", f"{info.num_samples:,}", f"{info.nbytes / 2**30:.2f}",
                       f"{share:.1%}", f"{info.num_cut / max(1, info.num_documents):.1%}", *means)  # fmt: skip
    console.print(totals)
    for name, info in sources.items():
        if info.num_unreachable:
            console.print(f"[yellow]not looked at[/yellow] {name}: {info.num_unreachable:,} unreachable samples")
    for of in TITLES:
        console.print("", histogram_table(of, {name: info.histograms[of] for name, info in sources.items()}))
    console.print("", mixture_table(mixture))
    console.print(f"rows filled {mixture.fill:.1%} (tokens or images, the larger share), tokens alone "
                  f"{mixture.token_fill:.1%}")  # fmt: skip


def histogram_table(of: str, histograms: Mapping[str, Histogram]) -> Table:
    made = table(TITLES[of], "from", *histograms, text_columns=1 + len(histograms))
    bounds = next(iter(histograms.values())).bounds
    largest = {name: max(1, *histogram.counts) for name, histogram in histograms.items()}
    used = [place for place in range(len(bounds)) if any(h.counts[place] for h in histograms.values())]
    for place in used:
        cells = [bar(h.counts[place] / largest[name], h.counts[place]) for name, h in histograms.items()]
        made.add_row(f"{bounds[place]:g}", *cells)
    return made


def bar(share: float, number: int, width: int = 8) -> str:
    return f"{'█' * round(share * width):<{width}} {number:,}" if number else ""


def mixture_table(mixture: MixtureInfo) -> Table:
    title = f"mixture over {mixture.num_rows:,} rows, weights share out {mixture.weight_unit}"
    made = table(title, "source", "configured", "documents", "tokens", "images")
    for name, weight in mixture.weights.items():
        columns = (mixture.documents, mixture.tokens, mixture.images)
        made.add_row(name, f"{weight:.1%}", *(f"{counts[name] / max(1, counts.total()):.1%}" for counts in columns))
    return made


def show_speed(speed: Speed, console: Console) -> None:
    console.print(
        f"[bold]{speed.rows_per_s:,.1f} rows, {speed.images_per_s:,.1f} images, {speed.tokens_per_s:,.0f} tokens a "
        f"second[/bold] ({speed.num_rows:,} rows in {speed.seconds:.1f} s, {speed.num_workers} workers)",
        highlight=False,
    )
    memory = ", ".join(f"{megabytes:,}" for megabytes in speed.worker_mb)
    console.print(f"first micro-batch after {speed.first_batch_s:.1f} s; most memory of each worker, MB: {memory}")
    stages = table("milliseconds a document in one process", "source", *STAGES)
    for name, spent in speed.stage_ms.items():
        stages.add_row(name, *(f"{spent[stage]:.2f}" for stage in STAGES))
    console.print("", stages)
