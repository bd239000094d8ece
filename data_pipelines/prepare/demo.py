"""Make the demo's corpora: ``python -m data_pipelines.prepare.demo --out outputs/demo/corpora``.

The same settings always give the same bytes. A folder that is there is complete: it is made beside its place and
then renamed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conf import UserError, run_cli
from data_pipelines.prepare.demo_corpora import heldout, laion, mmc4, photos, storyboard, webvid
from data_pipelines.prepare.demo_corpora.shards import Sample, encode_json, write_tar
from data_pipelines.prepare.demo_corpora.tokenizer import train_tokenizer

# Part of the settings: a folder made by other code is never taken for this code's.
VERSION = 3

SAMPLES = {
    "laion": 12_000,
    "mmc4": 1_000,
    "webvid": 400,
    "storyboard": 200,
    "photos": 180,
    "heldout": 300,
    "train_probe": 100,
}
# Below, a shard would be empty; above, keys would outgrow their digits.
MIN_SCALE, MAX_SCALE = 0.05, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.prepare.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo/corpora"), help="folder to make")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples to make (default 1.0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    arguments = parser.parse_args()
    if not MIN_SCALE <= arguments.scale <= MAX_SCALE:
        raise UserError(f"--scale is {arguments.scale}: give a number from {MIN_SCALE} to {MAX_SCALE}")
    made = prepare(arguments.out, arguments.scale, arguments.seed)
    manifest = json.loads((arguments.out / "manifest.json").read_text())
    counts = ", ".join(f"{name} {count}" for name, count in manifest["samples"].items())
    print(f"{'made' if made else 'already complete:'} {arguments.out} ({counts})")
    print("next: python -m trainer.pretrain data=demo")


def prepare(out: Path, scale: float = 1.0, seed: int = 0) -> bool:
    """Make all corpora in ``out``; False if they were there already.

    Raises UserError if ``out`` holds anything else.
    """
    settings = {"version": VERSION, "scale": scale, "seed": seed}
    if out.exists():
        _check_complete(out, settings)
        return False
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be made ({error.strerror}): choose another --out") from error
    samples = _write_corpora(partial, scale, seed)
    manifest = {"settings": settings, "samples": samples, "files": _files(partial)}
    (partial / "manifest.json").write_bytes(encode_json(manifest))
    partial.rename(out)
    return True


def _check_complete(out: Path, settings: dict[str, Any]) -> None:
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        same = manifest["settings"] == settings
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} exists and was not made by this command: choose another --out") from None
    if not same:
        raise UserError(f"{out} was made with other settings ({manifest['settings']}): remove it or change --out")
    broken = [name for name, size in sizes.items() if not (out / name).is_file() or (out / name).stat().st_size != size]
    if broken:
        raise UserError(f"{out / broken[0]} is missing or was changed: remove {out} and run this again")


def _write_corpora(folder: Path, scale: float, seed: int) -> dict[str, int]:
    """Write everything but the manifest; number of samples by corpus."""
    counts = {name: round(count * scale) for name, count in SAMPLES.items()}
    texts: list[str] = []
    with tqdm(total=sum(counts.values()), unit=" samples", desc="demo corpora", mininterval=0.5) as bar:

        def watched(samples: Iterable[Sample]) -> Iterator[Sample]:
            for sample in samples:
                texts.extend(sample.texts)
                bar.update()
                yield sample

        for path, samples in _shards(counts, seed):
            write_tar(folder / path, watched(samples))
        for name in ("heldout", "train_probe"):
            heldout.write_scenes(folder / name, name, counts[name], seed)
            bar.update(counts[name])
    _write_companions(folder, counts)
    train_tokenizer(texts, folder / "tokenizer.model")
    return counts


def _shards(counts: dict[str, int], seed: int) -> Iterator[tuple[str, Iterator[Sample]]]:
    """(file name, samples) of every tar. The names are those of each form's own writer."""
    yield from _numbered("laion", laion.samples(counts["laion"], seed), laion.SAMPLES_PER_SHARD, counts["laion"])
    yield from _numbered("webvid", webvid.samples(counts["webvid"], seed), webvid.SAMPLES_PER_SHARD, counts["webvid"])
    lean = counts["mmc4"] // 2
    yield "mmc4/000000000.tar", mmc4.samples("openflamingo", counts["mmc4"] - lean, seed)
    yield "mmc4/lean-000000.tar", mmc4.samples("lean", lean, seed)
    split = counts["storyboard"] // 5
    yield "storyboard/yt_sb-000000.tar", storyboard.samples("raw", counts["storyboard"] - split, seed)
    yield "storyboard/0000000.tar", storyboard.samples("split", split, seed)
    yield "photos/000000.tar", photos.samples(counts["photos"], seed)


def _numbered(
    name: str, samples: Iterator[Sample], per_shard: int, count: int
) -> Iterator[tuple[str, Iterator[Sample]]]:
    """Tars of ``per_shard`` samples; each must be read before the next is asked for."""
    for shard in range(math.ceil(count / per_shard)):
        yield f"{name}/{shard:05d}.tar", islice(samples, per_shard)


def _write_companions(folder: Path, counts: dict[str, int]) -> None:
    """What lies beside the tars."""
    for name, corpus in (("laion", laion), ("webvid", webvid)):
        per_shard = corpus.SAMPLES_PER_SHARD
        for shard, start in enumerate(range(0, counts[name], per_shard)):
            stats = corpus.shard_stats(range(start, min(start + per_shard, counts[name])))
            (folder / name / f"{shard:05d}_stats.json").write_bytes(encode_json(stats))
    (folder / "photos" / "README.txt").write_text(photos.README)


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file, by name relative to the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = ((path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths)
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents}


if __name__ == "__main__":
    run_cli(main)
