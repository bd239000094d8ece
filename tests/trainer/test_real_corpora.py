"""The command line on shards of other people's tools: img2dataset, OpenFlamingo, video2dataset, Emu's storyboard maker.

What it reports is compared with the samples that its rows were drawn from, judged here by their tar members alone.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.document import RawSample, SampleKey
from data_pipelines.loader import Loader, open_indexes
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from tests.trainer.tiny_job import history, run_command
from trainer.config import PretrainConfig, compose_config

pytestmark = pytest.mark.slow

NUM_STEPS = 6
JOB = [
    "model=emu_tiny",
    "data=corpora",
    "data.sources.webvid.weight=64",  # else a few steps would see hardly any of these
    "data.sources.storyboard.weight=32",
    "data.seq_len=512",
    "data.max_images_per_row=16",
    "data.lanes=4",
    "data.global_batch_rows=8",
    "data.micro_batch_rows=2",
    "data.window_rows=4",
    "parallel.threads=1",
    "monitor.log_every_steps=1",
    "monitor.wandb=disabled",
    f"total_steps={NUM_STEPS}",
]
SHARDS = {
    "laion": ["00000.tar", "00001.tar", "00002.tar", "cc12m-train-0000.tar"],
    "laion_coco": ["00000.tar"],
    "mmc4": ["000000000.tar", "lean-000000.tar"],
    "webvid": ["00000.tar", "return_all_test.tar"],
    "storyboard": ["0000000.tar", "yt_sb-000000.tar"],
}
SIMILARITY_THRESHOLD = 0.32


@pytest.fixture(scope="module")
def run_dir(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    places = [f"run_dir={folder / 'run'}", f"data.index_dir={folder / 'index'}"]
    done = run_command("trainer.pretrain", [*JOB, *places, "data.num_workers=2"], folder, EMU_DATA=str(real_data))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def config(run_dir: Path, real_data: Path) -> PretrainConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMU_DATA", str(real_data))
        return compose_config([*JOB, f"data.index_dir={run_dir.parent / 'index'}", "data.num_workers=0"])


def test_every_source_is_trained_on(run_dir: Path) -> None:
    records = history(run_dir)
    assert len(records) == NUM_STEPS
    for modality in ("text", "image"):
        assert records[-1][f"loss/{modality}"] < records[0][f"loss/{modality}"]
        for name in SHARDS:
            assert sum(record.get(f"targets/{modality}/{name}", 0) for record in records) > 100
    assert min(records[-1]["samples"][name] for name in SHARDS) > 10


def test_every_shard_is_indexed(run_dir: Path, config: PretrainConfig) -> None:
    for name, index in open_indexes(config.data, build_missing=False).items():
        assert [Path(index.url(shard)).name for shard in range(index.num_shards)] == SHARDS[name]


def test_reported_samples_and_skips_are_those_of_the_tars(
    run_dir: Path, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, str, str]] = []
    read = SourceReader.document

    def recording(reader: SourceReader, key: SampleKey, epoch: int, sample: RawSample) -> Any:
        drawn.append((key.source, reader.index.url(key.shard), sample.name))
        return read(reader, key, epoch, sample)

    monkeypatch.setattr(SourceReader, "document", recording)
    samples = trained_samples(config)
    skips: Counter[str] = Counter()
    judged: dict[str, dict[str, str]] = {}
    for source, shard, name in drawn:
        reason = judged.setdefault(shard, unusable_samples(source, Path(shard))).get(name)
        skips.update([f"{source}: {reason}"] if reason else [])

    last = history(run_dir)[-1]
    assert last["samples"] == samples
    assert last["skips"] == skips
    assert skips.keys() == {
        "webvid: no video",
        "webvid: not a video",
        "mmc4: no picture above the similarity threshold",
    }
    print(f"samples {last['samples']}, skips {last['skips']}")


def trained_samples(config: PretrainConfig) -> dict[str, int]:
    """Documents by source in the rows of the run, drawn again by one process without workers."""
    data, model = config.data, config.model
    indexes = open_indexes(data, build_missing=False)
    loader = Loader(
        data,
        indexes,
        Tokenizer(data.tokenizer),
        num_queries=model.causal_transformer.num_queries,
        image_size=model.vision.image_size,
        dp_rank=0,
        dp_size=1,
    )
    num_batches = NUM_STEPS * data.global_batch_rows // data.micro_batch_rows
    batches = [batch for _, batch in zip(range(num_batches), loader, strict=False)]
    return dict(Counter(key.source for batch in batches for row in batch.keys for key in row))


def unusable_samples(source: str, shard: Path) -> dict[str, str]:
    """Name -> why no document comes of it, by the members of the tar."""
    members: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(shard) as tar:
        for member in tar:
            name, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            members[name][extension] = file.read()
    found = {}
    for name, files in members.items():
        if source == "webvid" and "mp4" not in files:
            found[name] = "no video"
        elif source == "webvid" and files["mp4"][4:8] != b"ftyp":
            found[name] = "not a video"
        elif source == "mmc4" and not _has_similar_picture(files):
            found[name] = "no picture above the similarity threshold"
    return found


def _has_similar_picture(files: dict[str, bytes]) -> bool:
    pictures = enumerate(json.loads(files["json"])["image_info"])
    there = (info for number, info in pictures if info.get("image_base64") or f"{number}.jpg" in files)
    return any(info["matched_sim"] >= SIMILARITY_THRESHOLD for info in there)
