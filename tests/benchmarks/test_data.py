"""The data benchmark in small: it runs through, and its bare loops and fill do what they say."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, data_corpora
from benchmarks.data_contenders import NUM_FRAMES, Corpus, decode_clip, decode_jpeg, sample_files
from data_pipelines.document import Frame, Image, Picture
from data_pipelines.pictures import decode_pictures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_corpora, "CLIP_FRAMES", 30)
        patch.setattr(data_corpora, "NUM_CLIPS", 2)
        patch.setattr(data_corpora, "SETS", {name: (2, 16, make) for name, (_, _, make) in data_corpora.SETS.items()})
        data_corpora.make_corpora(folder / "shards")
    return folder


def test_the_last_line(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.run(argparse.Namespace(out=out, real=out / "shards" / "small", workers=2, repetitions=1, scale=0.004))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"ratios: vs_webdataset=\d+\.\d\d vs_decode_limit=\d+\.\d\d fill=[01]\.\d{4}", lines[-1])
    assert [line.split()[0] for line in lines if line.startswith(("small ", "large ", "video ", "real "))] == [
        *("small", "large", "video", "real")
    ]


@pytest.mark.parametrize("name", ["small", "large", "video"])
def test_a_bare_loop_gives_the_pixels_of_the_pipeline(out: Path, name: str) -> None:
    shards = out / "shards"
    corpus = Corpus(name, data.KINDS[name], shards / name, shards / "tokenizer.model", out / "index", 8)
    for encoded in sample_files(corpus, 3):
        pictures: list[Picture] = [Image(encoded)]
        if name == "video":
            pictures = [Frame(encoded, slot, NUM_FRAMES) for slot in range(NUM_FRAMES)]
        bare = decode_clip(encoded) if name == "video" else decode_jpeg(encoded)
        np.testing.assert_array_equal(np.stack(bare), np.stack(decode_pictures(pictures, 224, 10**9)))  # type: ignore[arg-type]


def test_what_is_made_is_kept(out: Path) -> None:
    shard = out / "shards" / "small" / "00000.tar"
    written = shard.stat().st_mtime_ns
    data_corpora.make_corpora(out / "shards")
    assert shard.stat().st_mtime_ns == written
