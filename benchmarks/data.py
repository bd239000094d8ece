"""How fast the data pipeline is, against the usual pipeline and against nothing but decoding: ``make bench-data``.

Per set of shards, in turns within one run, on the same cores with the same number of processes:

    ours         Index and Loader: shuffled, tokenised, packed rows of whole documents, 224 px
    webdataset   plain webdataset, Pillow and torch's DataLoader: shuffled, tokenised batches, 224 px bicubic
    bare         decoder and resize of ours in a loop over files in memory, into rows of as many pictures as ours

Medians over the turns count, and the time after the first batch (``make bench-resume`` looks at that before it).
Pixels are compared with a full decode and Pillow's bicubic.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.data_contenders import Corpus, measure_bare, measure_ours, measure_webdataset
from benchmarks.data_corpora import make_corpora
from benchmarks.data_quality import mixture_fill, pixel_differences
from conf import run_cli
from data_pipelines.config import DataConfig

OUT = Path("outputs/benchmarks/data")
REPETITIONS = 5
NUM_PICTURES = {"small": 8192, "large": 4096, "video": 1536, "real": 4096}
KINDS = {"small": "laion", "large": "laion", "video": "webvid"}


@dataclass
class Result:
    """Pictures a second by contender, one a turn; memory: USS and PSS of our largest worker, in MB."""

    name: str
    rates: dict[str, list[float]]
    memory: tuple[float, float]
    differences: tuple[float, float]

    def rate(self, contender: str) -> float:
        return statistics.median(self.rates[contender])

    def ratio(self, other: str) -> float:
        """Median over the turns: what slows the machine down for a while slows both."""
        return statistics.median(
            ours / theirs for ours, theirs in zip(self.rates["ours"], self.rates[other], strict=True)
        )


def measure(corpus: Corpus, repetitions: int, num_workers: int) -> Result:
    """The contenders take turns, so that a slow moment of the machine falls on all of them."""
    memory: list[tuple[float, float]] = []
    contenders: dict[str, Callable[[], float]] = {
        "ours": lambda: measure_ours(corpus, num_workers, memory),
        "bare": lambda: measure_bare(corpus, num_workers),
    }
    if corpus.kind == "laion":
        contenders["webdataset"] = lambda: measure_webdataset(corpus, num_workers)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(repetitions), desc=f"measure {corpus.name}", unit="repetition", disable=None):
        for name, run in contenders.items():
            rates[name].append(run())
    return Result(corpus.name, rates, max(memory), pixel_differences(corpus))


def report(results: list[Result], fill: float, num_workers: int) -> None:
    print(f"\npictures/s with {num_workers} workers, and the main process, on {os.cpu_count()} cores")
    print(
        f"{'set':<8}{'ours':>8}{'webdataset':>12}{'bare':>8}{'vs web':>8}{'vs bare':>9}{'diff mean/max':>16}{'MB':>12}"
    )
    for result in results:
        has_peer = "webdataset" in result.rates
        columns = f"{result.rate('webdataset'):>12.0f}" if has_peer else f"{'-':>12}"
        ratio = f"{result.ratio('webdataset'):>8.2f}" if has_peer else f"{'-':>8}"
        difference = "{:.2f}/{:.2f}".format(*result.differences)
        memory = "{:.0f}/{:.0f}".format(*result.memory)
        print(
            f"{result.name:<8}{result.rate('ours'):>8.0f}{columns}{result.rate('bare'):>8.0f}{ratio}"
            f"{result.ratio('bare'):>9.2f}{difference:>16}{memory:>12}"
        )
    print("diff: mean absolute pixel difference of all pictures, and of the worst one, in 255ths")
    print("MB: unique/proportional memory of a worker; the encoded pictures that a rank holds are bounded by")
    print(f"data.buffer_mb={DataConfig.buffer_mb}")
    print(f"fill of the mixture's rows: {fill:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where shards and indexes are made (default %(default)s)")
    parser.add_argument("--real", type=Path, metavar="DIR", help="measure the img2dataset shards DIR/*.tar as well")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument(
        "--repetitions", type=int, default=REPETITIONS, help="turns of every contender (default %(default)s)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="pictures a turn, relative to the default")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    shards, indexes = arguments.out / "shards", arguments.out / "index"
    make_corpora(shards)
    folders = {name: shards / name for name in KINDS} | ({"real": arguments.real} if arguments.real else {})
    corpora = [
        Corpus(
            name=name,
            kind=KINDS.get(name, "laion"),
            folder=folder,
            tokenizer=shards / "tokenizer.model",
            index_dir=indexes,
            num_pictures=int(NUM_PICTURES[name] * arguments.scale),
        )
        for name, folder in folders.items()
    ]
    results = [measure(corpus, arguments.repetitions, arguments.workers) for corpus in corpora]
    fill = mixture_fill(shards, indexes)
    report(results, fill, arguments.workers)
    made = {result.name: result for result in results if result.name in KINDS}
    worst = min(result.ratio("bare") for result in made.values())
    print(f"ratios: vs_webdataset={made['large'].ratio('webdataset'):.2f} vs_decode_limit={worst:.2f} fill={fill:.4f}")


if __name__ == "__main__":
    run_cli(main)
