"""How soon a rank is ready in a corpus of 7e9 samples, anywhere in an epoch: ``python -m benchmarks.order``.

Writes the index of 700,000 shards that do not exist, then starts data-parallel ranks (of 128, with 8,192 lanes) in
fresh processes: one at the beginning of an epoch, one at 90 % of it. Each opens the index, makes its loader with the
cursors of its lanes and takes its first row. The bytes of a shard come from a file system in memory, which costs as
good as nothing; the rest is the code of a run. Beside it, in the same run, webdataset's way to the same places.

Last line: the worse of the two positions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sentencepiece

from benchmarks.order_corpus import CAPTIONS, CHUNK_SAMPLES, chunk_bytes, url_of
from conf import UserError, run_cli
from data_pipelines.index import BLOCKSIZE, CHUNK_FIELDS, FORMAT_VERSION, SHARD_FIELDS

NUM_SHARDS, SAMPLES_PER_SHARD = 700_000, 10_000
DP_SIZE = 128
POSITIONS = (0.0, 0.9)
SHARDS_AT_ONCE = 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.order", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=NUM_SHARDS, help="shards of 10,000 samples (%(default)s)")
    num_shards = parser.parse_args().shards
    with tempfile.TemporaryDirectory(prefix="bench-order-") as name:
        folder = Path(name)
        began = time.perf_counter()
        write_index(folder / "index", num_shards)
        train_tokenizer(folder)
        print(
            f"index of {num_shards:,} shards and {num_shards * SAMPLES_PER_SHARD:,} samples: "
            f"{_gigabytes(folder / 'index'):.2f} GB, written in {time.perf_counter() - began:.1f} s"
        )
        ranks = [_in_fresh_process("rank", folder, position) for position in POSITIONS]
        peer = _in_fresh_process("webdataset", num_shards)
    _print_table(ranks, peer, num_shards)
    print(f"seconds={max(r['seconds'] for r in ranks):.2f} megabytes={max(r['megabytes'] for r in ranks):.0f}")


def write_index(folder: Path, num_shards: int) -> None:
    """An index as `build_index` writes it, of shards that all look alike."""
    folder.mkdir()
    first = np.arange(0, SAMPLES_PER_SHARD, CHUNK_SAMPLES)
    sizes = [chunk_bytes(min(CHUNK_SAMPLES, SAMPLES_PER_SHARD - int(start))) // BLOCKSIZE for start in first]
    chunks = np.zeros((SHARDS_AT_ONCE, len(first)), CHUNK_FIELDS)
    chunks["first_sample"], chunks["num_blocks"], chunks["first_block"] = first, sizes, np.cumsum([0, *sizes[:-1]])
    with (folder / "chunks.npy").open("wb") as file:
        shape = {"descr": np.lib.format.dtype_to_descr(CHUNK_FIELDS), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**shape, "shape": (num_shards * len(first),)})
        for begin in range(0, num_shards, SHARDS_AT_ONCE):
            rows = chunks[: num_shards - begin]
            rows["shard"] = np.arange(begin, begin + len(rows))[:, None]
            rows.tofile(file)
    _write_shards(folder, num_shards, len(first), sum(sizes) * BLOCKSIZE)
    header = {
        "format": FORMAT_VERSION,
        "source": "laion",
        "patterns": ["synthetic://"],
        "chunk_samples": CHUNK_SAMPLES,
        "chunk_mb": 4.0,
        "num_shards": num_shards,
        "num_chunks": num_shards * len(first),
        "num_samples": num_shards * SAMPLES_PER_SHARD,
        "max_chunk_samples": CHUNK_SAMPLES,
        "num_defects": 0,
        "num_disagreements": 0,
        "fingerprint": "synthetic",
    }
    (folder / "index.json").write_text(json.dumps(header))


def _write_shards(folder: Path, num_shards: int, chunks_per_shard: int, shard_bytes: int) -> None:
    url_nbytes = len(url_of(0))
    shards = np.zeros(num_shards, SHARD_FIELDS)
    shards["url_start"] = np.arange(num_shards) * (url_nbytes + 1)
    shards["url_nbytes"], shards["num_samples"], shards["size"] = url_nbytes, SAMPLES_PER_SHARD, shard_bytes
    shards["first_chunk"] = np.arange(num_shards) * chunks_per_shard
    np.save(folder / "shards.npy", shards)
    (folder / "urls.txt").write_text("".join(f"{url_of(shard)}\n" for shard in range(num_shards)))
    (folder / "shard_bytes").write_text(str(shard_bytes))


def train_tokenizer(folder: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 4),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )


def _in_fresh_process(*arguments: object) -> dict:
    command = [sys.executable, "-m", "benchmarks.order_process", *map(str, arguments)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise UserError(f"{' '.join(command)} failed with code {finished.returncode}: see its message above")
    return json.loads(finished.stdout.splitlines()[-1])


def _print_table(ranks: list[dict], peer: dict, num_shards: int) -> None:
    row = "{:<44} {:>9} {:>12} {:>10}".format
    print(row("ready, with the first row's keys", "position", "seconds", "megabytes"))
    for position, rank in zip(POSITIONS, ranks, strict=True):
        print(
            row(f"  this project, 1 of {DP_SIZE} ranks", f"{position:.0%}", f"{rank['seconds']:.2f}", rank["megabytes"])
        )
    print(row("  webdataset, first sample", "0%", f"{peer['seconds']:.2f}", peer["megabytes"]))
    skipped = int(POSITIONS[-1] * num_shards * SAMPLES_PER_SHARD / DP_SIZE)
    seconds = peer["seconds"] + skipped / peer["samples_per_second"]
    print(row("  webdataset, reading up to it *", f"{POSITIONS[-1]:.0%}", f"{seconds:,.0f}", peer["megabytes"]))
    print(f"  * extrapolated: {skipped:,} samples a rank at the {peer['samples_per_second']:,.0f} a second seen here")


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e9


if __name__ == "__main__":
    run_cli(main)
