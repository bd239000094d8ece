"""MMC4 from its archives and pictures: documents as in ready-made shards, layouts, hostile input."""

from __future__ import annotations

import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf import UserError
from data_pipelines.document import Document, Image, RawSample, Text
from data_pipelines.images import decode_image, decode_rgb
from data_pipelines.prepare import mmc4
from tests.data_pipelines.prepare_helpers import page, run, samples_of, shards_of, stats_of, write_mmc4, write_pages
from tests.data_pipelines.sources_helpers import picture, pictures, read_samples, rng, source


def prepare(tmp_path: Path, *pages: Any, **files: bytes) -> list[RawSample]:
    """Shards of one archive; files: pictures of it by their name before .jpg."""
    images = tmp_path / "images" / "7"
    images.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (images / f"{name}.jpg").write_bytes(content)
    archive = write_pages(tmp_path / "docs_shard_7_v2.jsonl.zip", *pages)
    run(mmc4, archive, "--images", tmp_path / "images", "--out", tmp_path / "out")
    return samples_of(tmp_path / "out")


def test_pages_and_pictures(tmp_path: Path) -> None:
    arguments = write_mmc4(tmp_path)
    run(mmc4, *arguments, "--out", tmp_path / "out")
    shards = shards_of(tmp_path / "out")
    assert {name: len(samples) for name, samples in shards.items()} == {
        f"docs_no_face_shard_{number}_v2-{part:05d}.tar": size
        for number in (0, 1)
        for part, size in enumerate((3, 3, 1))
    }
    second = shards["docs_no_face_shard_1_v2-00001.tar"]
    assert [sample.name for sample in second] == [f"docs_no_face_shard_1_v2-{place:06d}" for place in (3, 4, 5)]
    assert set(second[0].members) == {"0.png", "json"}  # the other one is missing
    assert second[1].members == {
        "0.png": picture((1, 4, 0)),
        "1.png": picture((1, 4, 1)),
        "json": json.dumps(page(1, 4)).encode(),
    }
    assert stats_of(tmp_path / "out") == {"success": 14, "images named by the pages": 28, "image missing": 6}


def test_both_layouts_give_the_same_documents(tmp_path: Path) -> None:
    arguments = write_mmc4(tmp_path)
    for layout in ("lean", "openflamingo"):
        run(mmc4, *arguments, "--layout", layout, "--out", tmp_path / layout)
    lean, whole = samples_of(tmp_path / "lean"), samples_of(tmp_path / "openflamingo")
    assert all(set(sample.members) == {"json"} for sample in whole)
    read = source("mmc4")
    documents = [[read(sample, rng(seed)) for seed, sample in enumerate(form)] for form in (lean, whole)]
    assert documents[0] == documents[1]
    assert all(isinstance(document, Document) for document in documents[0])


@pytest.mark.parametrize(
    ("folders", "place"),
    [("number", "7"), ("position", "0"), ("flat", "docs_shard_7_v2_images"), ("flat", ".")],
)
def test_where_the_pictures_are(tmp_path: Path, folders: str, place: str) -> None:
    (tmp_path / "images" / place).mkdir(parents=True)
    (tmp_path / "images" / place / "7_0_0.jpg").write_bytes(picture())
    archive = write_pages(tmp_path / "docs_shard_7_v2.jsonl.zip", page(7, 0))
    run(mmc4, archive, "--images", tmp_path / "images", "--folders", folders, "--out", tmp_path / "out")
    assert samples_of(tmp_path / "out")[0].members["0.png"] == picture()


def test_the_wrong_folder_of_pictures_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "images" / "0").mkdir(parents=True)
    archive = write_pages(tmp_path / "docs_shard_7_v2.jsonl.zip", page(7, 0))
    with pytest.raises(UserError, match=r"images/7 is missing.*--folders"):
        run(mmc4, archive, "--images", tmp_path / "images", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_jsonl_and_numeric_order(tmp_path: Path) -> None:
    for number in (10, 9):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        (tmp_path / f"docs_shard_{number}_v3.jsonl").write_text(json.dumps(page(number, 0)) + "\n\n")
    arguments = [f"{tmp_path}/*.jsonl", "--images", tmp_path / "images", "--folders", "position"]
    (tmp_path / "images" / "0").mkdir()
    (tmp_path / "images" / "0" / "9_0_0.jpg").write_bytes(picture())
    run(mmc4, *arguments, "--out", tmp_path / "out")
    shards = shards_of(tmp_path / "out")
    assert "0.png" in shards["docs_shard_9_v3-00000.tar"][0].members  # 9 comes before 10
    assert set(shards["docs_shard_10_v3-00000.tar"][0].members) == {"json"}


def test_names_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture())
    (tmp_path / "images" / "7").mkdir(parents=True)
    (tmp_path / "images" / "7" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "images" / "7" / "folder.jpg").mkdir()
    (tmp_path / "images" / "7" / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(tmp_path / "images" / "7" / "pipe.jpg")
    names = ["../../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "..", "", "a\0b", "..\\secret.jpg"]
    names += [7, None, "x" * 300]
    names += ["folder.jpg", "pipe.jpg", "circle.jpg"]
    hostile = {**page(7, 0), "image_info": [{"image_name": name} for name in names] + [{}]}
    (sample,) = prepare(tmp_path, hostile)
    assert set(sample.members) == {"json"}
    counts = stats_of(tmp_path / "out")
    assert counts.pop("success") == 1 and counts.pop("images named by the pages") == 14
    assert counts == {
        "image has an unsafe name": 9,
        "image lies outside its folder": 1,
        "image cannot be read": 3,
        "image is no regular file": 1,
    }


def test_broken_pages_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    pages = [
        *("{", "[1]", "[" * 100_000, '{"text_list": 3}', '{"text_list": [], "image_info": [3]}'),
        *({**page(7, 0), "image_info": [{}] * 2000}, '"' + "x" * (5 << 20) + '"', page(7, 1)),
    ]
    (sample,) = prepare(tmp_path, *pages, **{"7_1_0": b"<html>gone</html>", "7_1_1": picture()})
    assert set(sample.members) == {"1.png", "json"}
    counts = stats_of(tmp_path / "out")
    assert counts == {
        **{"page is no json": 4, "page has no text_list": 2, "page has no image_info": 1},
        **{"page has too many images": 1, "success": 1, "images named by the pages": 2, "image file is no picture": 1},
    }


def test_large_pictures_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmc4, "MAX_PICTURES_BYTES", len(picture()) + 10)
    (sample,) = prepare(tmp_path, page(7, 0), **{"7_0_0": picture(), "7_0_1": picture()})
    assert set(sample.members) == {"0.png", "json"}
    assert stats_of(tmp_path / "out")["image too large"] == 1


def test_bombs_and_damaged_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before the damage is kept, and the damage is counted."""
    monkeypatch.setattr(mmc4, "MAX_UNPACKED_BYTES", 1 << 20)
    monkeypatch.setattr(mmc4, "MAX_PAGE_BYTES", 1 << 17)
    (tmp_path / "images" / "1").mkdir(parents=True)
    write_pages(tmp_path / "docs_shard_1_v2.jsonl.zip", page(1, 0), "0" * (4 << 20))
    noise = random.Random(0)
    pages = [{**page(2, place), "url": noise.randbytes(400).hex()} for place in range(150)]
    good = write_pages(tmp_path / "docs_shard_2_v2.jsonl.zip", *pages)
    cut = bytearray(good.read_bytes())
    cut[len(cut) // 2 : len(cut) // 2 + 64] = bytes(64)
    good.write_bytes(cut)
    (tmp_path / "docs_shard_3_v2.jsonl.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    (tmp_path / "docs_shard_4_v2.jsonl.zip").write_bytes(good.read_bytes()[:3000])
    run(mmc4, f"{tmp_path}/*.zip", "--images", tmp_path / "images", "--out", tmp_path / "out")
    counts = stats_of(tmp_path / "out")
    assert counts["file damaged: the rest of it is left out"] == 3
    shards = shards_of(tmp_path / "out")
    assert len(shards["docs_shard_1_v2-00000.tar"]) == 1
    assert 40 < len(shards["docs_shard_2_v2-00000.tar"]) < 100
    assert not any("shard_3" in name or "shard_4" in name for name in shards)


def test_member_names_of_archives_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "images" / "7").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "docs_shard_7_v2.jsonl.zip", "w") as archive:
        archive.writestr("../../evil.jsonl", json.dumps(page(7, 0)))
    before = set(tmp_path.rglob("*"))
    run(mmc4, tmp_path / "docs_shard_7_v2.jsonl.zip", "--images", tmp_path / "images", "--out", tmp_path / "out")
    assert [sample.name for sample in samples_of(tmp_path / "out")] == ["docs_shard_7_v2-000000"]
    assert {path.parent for path in set(tmp_path.rglob("*")) - before} == {tmp_path, tmp_path / "out"}


def without_pictures(document: Document) -> list[str]:
    return [element.text if isinstance(element, Text) else "<picture>" for element in document.elements]


def test_real_pages_are_the_documents_of_the_ready_made_shard(real_data: Path, tmp_path: Path) -> None:
    """The ready-made shard was made from the same pages.

    Inherent differences: keys (its own are random), and pictures (it holds jpegs made of the same files).
    """
    folder = real_data / "mmc4"
    run(mmc4, folder / "docs_no_face_shard_0_v2.jsonl.zip", "--images", folder / "images", "--out", tmp_path / "out")
    assert stats_of(tmp_path / "out") == {"success": 9, "images named by the pages": 26, "image missing": 1}
    ready = {json.loads(raw.members["json"])["url"]: raw for raw in read_samples(folder / "lean-000000.tar")}
    read = source("mmc4", similarity_threshold=0.0)
    num_compared = 0
    for seed, raw in enumerate(samples_of(tmp_path / "out")):
        meta = json.loads(raw.members["json"])
        other = ready[meta["url"]]
        assert json.loads(other.members["json"]) == meta
        mine, theirs = read(raw, rng(seed)), read(other, rng(seed))
        assert isinstance(mine, Document) and isinstance(theirs, Document)
        assert without_pictures(mine) == without_pictures(theirs)
        for left, right in zip(pictures(mine), pictures(theirs), strict=True):
            assert_same_motif(left, right)
            num_compared += 1
    assert num_compared == 25


def assert_same_motif(mine: Any, theirs: Any) -> None:
    assert isinstance(mine, Image) and isinstance(theirs, Image)
    assert decode_rgb(mine.encoded, 10**8).size == decode_rgb(theirs.encoded, 10**8).size
    difference = np.abs(decode_image(mine, 32, 10**8).astype(int) - decode_image(theirs, 32, 10**8)).mean()
    assert difference < 6
