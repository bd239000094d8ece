"""Mutated shards through the whole pipeline: ``python -m tests.data_pipelines.fuzz --number 2000``.

Every case is made from its number alone. Cases run in a child process, so that a crash of a decoder, a hang or a
runaway allocation is a finding and not the end: the child dies, and the next one goes on behind the case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from webdataset.tariterators import group_by_keys, tar_file_expander

from conf import UserError
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.document import SampleKey, Skip
from data_pipelines.index import Index
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.packing import tokenize_documents
from data_pipelines.prepare.demo import prepare
from data_pipelines.reader import SourceReader
from data_pipelines.tar_samples import scan_samples
from data_pipelines.tokenizer import Tokenizer
from tests.conftest import REAL_DATA
from tests.data_pipelines.fuzz_mutations import mutate, some_samples

SECONDS_PER_CASE = 30
MAX_GROWTH_MB = 400
"""A case may hold that much more than the one before: pictures of 4 megapixels, members of 8 MiB, frames of a clip."""
ADDRESS_SPACE_MB = 4096
NUM_QUERIES, IMAGE_SIZE = 4, 32
REAL_SHARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "laion/00000.tar": ("laion", {}),
    "laion/cc12m-train-0000.tar": ("pairs", {}),
    "laion_coco/00000.tar": (
        "laion",
        {"caption": "json:all_captions", "min_similarity": 0.0, "missing_fields": "keep"},
    ),
    "mmc4/000000000.tar": ("mmc4", {"similarity_threshold": 0.1}),
    "mmc4/lean-000000.tar": ("mmc4", {"assignment": "solved", "similarity_threshold": 0.0}),
    "webvid/00000.tar": ("webvid", {}),
    "webvid/return_all_test.tar": ("webvid", {"frame_choice": "centre"}),
    "yt_storyboard/0000000.tar": ("storyboard", {}),
    "yt_storyboard/yt_sb-000000.tar": ("storyboard", {}),
    "corrupt/png_modes.tar": ("pairs", {}),
    "corrupt/jpg_is_animated_gif.tar": ("pairs", {}),
    "corrupt/mp4_truncated.tar": ("webvid", {}),
}
DRAWN_SHARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "laion/00000.tar": ("laion", {}),
    "photos/000000.tar": ("pairs", {}),
    "mmc4/000000000.tar": ("mmc4", {}),
    "mmc4/lean-000000.tar": ("mmc4", {"assignment": "solved"}),
    "webvid/00000.tar": ("webvid", {}),
    "storyboard/yt_sb-000000.tar": ("storyboard", {}),
    "storyboard/0000000.tar": ("storyboard", {}),
}


class Corpus(NamedTuple):
    """A whole shard; ranges: where its samples stand."""

    name: str
    kind: str
    options: dict[str, Any]
    tar: bytes
    ranges: list[tuple[int, int]]


@dataclass
class Findings:
    """failures: number of the case -> what went wrong; results: how the others ended."""

    failures: dict[int, str] = field(default_factory=dict)
    results: Counter[str] = field(default_factory=Counter)


def make_drawn_corpora(folder: Path) -> None:
    prepare(folder, scale=0.05)


def open_corpora(drawn: Path) -> tuple[list[Corpus], Tokenizer]:
    """The drawn shards, and the real ones where there are any."""
    shards = {drawn / name: recipe for name, recipe in DRAWN_SHARDS.items()}
    if REAL_DATA.is_dir():
        shards |= {REAL_DATA / name: recipe for name, recipe in REAL_SHARDS.items()}
    corpora = []
    for path, (kind, options) in shards.items():
        tar = path.read_bytes()
        ranges = scan_samples(io.BytesIO(tar), len(tar)).ranges
        corpora.append(Corpus(path.name, kind, options, tar, ranges))
    return corpora, Tokenizer(drawn / "tokenizer.model")


def make_case(number: int, corpora: list[Corpus]) -> tuple[Corpus, bytes, str]:
    rng = np.random.default_rng(number)
    corpus = corpora[int(rng.integers(len(corpora)))]
    tar, names = mutate(some_samples(corpus.tar, corpus.ranges, rng), rng)
    return corpus, tar, names


def examine(corpus: Corpus, tar: bytes, tokenizer: Tokenizer, folder: Path) -> str:
    """How a case ends, a word; AssertionError where a sample is lost or counted twice."""
    shard = folder / "shard.tar"
    shard.write_bytes(tar)
    account_for_members(tar)
    source = SourceConfig(corpus.kind, str(shard), options=corpus.options)
    config = DataConfig(
        {"x": source},
        "unused",
        str(folder / "index"),
        seq_len=512,
        max_images_per_row=12,
        global_batch_rows=1,
        lanes=1,
        window_rows=2,
        num_workers=0,
        chunk_samples=2,
        max_image_megapixels=4.0,
        max_member_mb=8.0,
    )
    try:
        indexes = open_indexes(config, build_missing=True)
    except UserError as error:
        assert "hold no sample" in str(error), error
        return "no sample"
    return account_for_samples(config, indexes, tokenizer)


def account_for_members(tar: bytes) -> None:
    """What is in no sample's range is in a defect: without one, webdataset itself reads the same, to the tar's end."""
    found = scan_samples(io.BytesIO(tar), len(tar))
    ends = [0, *(end for _, end in found.ranges)]
    assert all(before <= start < end <= len(tar) for before, (start, end) in zip(ends, found.ranges, strict=False))
    if found.defects:
        return
    files = tar_file_expander([{"url": "x", "stream": io.BytesIO(tar)}])
    names = [sample["__key__"] for sample in group_by_keys(files, handler=lambda _: True)]
    assert len(names) == len(found.ranges), "webdataset finds other samples"
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r|") as archive:
        last = max((info.offset_data + info.size for info in archive), default=0)
    assert not any(tar[last + BLOCKSIZE :]), "something behind the last member is neither a sample nor a defect"


def account_for_samples(config: DataConfig, indexes: dict[str, Index], tokenizer: Tokenizer) -> str:
    """An epoch through the loader: emitted and skipped are what the samples one by one say, in number and reason."""
    reader = SourceReader("x", config, indexes["x"])
    loader = Loader(
        config, indexes, tokenizer, num_queries=NUM_QUERIES, image_size=IMAGE_SIZE, dp_rank=0, dp_size=1
    )  # fmt: skip
    emitted: Counter[SampleKey] = Counter()
    skips: Counter[str] = Counter()
    num_broken = 0
    with contextlib.closing(iter(loader)) as batches:  # type: ignore[type-var]
        while True:
            try:
                batch = next(batches)
            except UserError as error:
                assert "gave no document" in str(error), error
                assert not one_by_one(reader, config, tokenizer, reader.units.num_units, 0)[0]
                return "no document"
            emitted.update(batch.keys[0])
            skips.update({reason: count for (_, reason), count in batch.all_skips().items()})
            num_broken += int((~batch.document_ok).sum())
            ((q, offset),) = batch.cursors[0].sources
            if batch.cursors[0].row == 0 and q >= reader.units.num_units:
                break
    documents, skipped = one_by_one(reader, config, tokenizer, q, offset)
    assert emitted == documents, "other documents than the samples give"
    assert not skipped - skips, f"skips that were not counted: {skipped - skips}"
    assert (skips - skipped).total() == num_broken, f"{skips - skipped} for {num_broken} broken documents"
    return "broken picture" if num_broken else "skips" if skips else "whole"


def one_by_one(
    reader: SourceReader, config: DataConfig, tokenizer: Tokenizer, q: int, offset: int
) -> tuple[Counter[SampleKey], Counter[str]]:
    """Documents and reasons of all samples before (q, offset), each read by its key."""
    documents: Counter[SampleKey] = Counter()
    skipped: Counter[str] = Counter()
    for number in range(q + 1):
        unit = reader.units.unit(number)
        last = min(unit.last, unit.first + offset) if number == q else unit.last
        for key, sample in reader.samples(unit.chunk)[unit.first : last]:
            result: Any = reader.document(key, unit.epoch, sample)
            if not isinstance(result, Skip):
                limits = (NUM_QUERIES, config.seq_len, config.max_images_per_row)
                (result,) = tokenize_documents([(key, unit.epoch, result)], tokenizer, *limits)
            if isinstance(result, Skip):
                skipped[result.reason] += 1
            else:
                documents[key] += 1
    return documents, skipped


def run_child(drawn: Path, numbers: range) -> None:
    """A line before and after every case. Death by a signal is the report of a crash or a hang."""
    corpora, tokenizer = open_corpora(drawn)
    limit = process_mb("VmSize") + ADDRESS_SPACE_MB
    resource.setrlimit(resource.RLIMIT_AS, (limit << 20, limit << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        # Its default action ends the process, foreign code or not; time on the processor, whatever else runs here.
        signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_CASE)
        corpus, tar, names = make_case(number, corpora)
        tell(number, "begun", f"{corpus.name} {names}")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = process_mb("VmRSS")
        try:
            with tempfile.TemporaryDirectory() as folder:
                result = examine(corpus, tar, tokenizer, Path(folder))
            growth = process_mb("VmHWM") - before
            assert growth < MAX_GROWTH_MB, f"grew by {growth} MB"
            tell(number, "ended", result)
        except BaseException:
            tell(number, "failed", traceback.format_exc())
        signal.setitimer(signal.ITIMER_PROF, 0)


def tell(number: int, what: str, text: str) -> None:
    print(json.dumps([number, what, text]), flush=True)


def process_mb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(name + ":"))


def fuzz(drawn: Path, first: int, number: int) -> Findings:
    """Cases first, first + 1, ...; a new child after each that killed one."""
    findings = Findings()
    following, end = first, first + number
    with tqdm(total=number, desc="fuzz", unit="case", disable=None) as bar:
        while following < end:
            command = [sys.executable, "-m", "tests.data_pipelines.fuzz", "--child", str(drawn)]
            command += ["--first", str(following), "--number", str(end - following)]
            with tempfile.TemporaryFile("w+") as stderr:  # a pipe that nobody reads fills up, and the child waits
                with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as child:
                    following, begun = read_child(child, findings, bar, following)
                stderr.seek(0)
                errors = stderr.read()
            if child.returncode and begun:
                findings.failures[following] = f"{begun}: ended by {exit_name(child.returncode)}\n{errors[-600:]}"
                following += 1
                bar.update()
            assert not child.returncode or begun, f"the child does not start: {errors}"
    return findings


def read_child(child: subprocess.Popen[str], findings: Findings, bar: tqdm, following: int) -> tuple[int, str]:
    """Number of the case behind the last that ended, and the description of one that was begun and did not end."""
    begun = ""
    for line in child.stdout or ():
        number, what, text = json.loads(line)
        if what == "begun":
            following, begun = number, text
            continue
        if what == "failed":
            findings.failures[number] = f"{begun}: {text}"
            tqdm.write(f"case {number} failed: {begun}", file=sys.stderr)
        findings.results[what if what == "failed" else text] += 1
        following, begun = number + 1, ""
        bar.update()
    return following, begun


def exit_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.data_pipelines.fuzz", description=__doc__)
    parser.add_argument("--number", type=int, default=2000, help="cases to run (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (%(default)s)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, range(arguments.first, arguments.first + arguments.number))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_drawn_corpora(Path(folder) / "drawn")
        findings = fuzz(Path(folder) / "drawn", arguments.first, arguments.number)
    for number, failure in findings.failures.items():
        print(f"case {number}: {failure}")
    results = ", ".join(f"{name} {count}" for name, count in findings.results.most_common())
    print(f"fuzzed {arguments.number} cases ({results}): {len(findings.failures)} failures")
    print("next: python -m tests.data_pipelines.fuzz --first N --number 1 runs case N alone")
    sys.exit(bool(findings.failures))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
