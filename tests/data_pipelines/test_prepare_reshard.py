"""Cutting and joining tars."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from conf import UserError
from data_pipelines.prepare import reshard
from tests.data_pipelines.corpora import write_pairs, write_texts
from tests.data_pipelines.prepare_helpers import run, samples_of, shards_of, stats_of, write_tars
from tests.data_pipelines.sources_helpers import read_samples


def members_of(*paths: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of all regular members, by tarfile alone."""
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            found += [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]  # type: ignore[union-attr]
    return found


def write_members(path: Path, *members: tuple[str, bytes], **header: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in header.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def sizes(out: Path) -> list[int]:
    return [len(samples) for samples in shards_of(out).values()]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (("--samples-per-shard", 8), [8, 8, 3]),
        (("--samples-per-shard", 1000), [19]),
        (("--samples-per-shard", 1), [1] * 19),
        (("--shard-mb", 6 * 4096 / 2**20), [6, 6, 6, 1]),  # two members of a block, three blocks of headers each
        (("--shard-mb", 6 * 4096 / 2**20, "--samples-per-shard", 4), [4, 4, 4, 4, 3]),
        (("--shard-mb", 1e-6), [1] * 19),
    ],
)
def test_sizes(tmp_path: Path, size: tuple[object, ...], expected: list[int]) -> None:
    tars = write_tars(tmp_path / "in")[0]
    run(reshard, tars, *size, "--out", tmp_path / "out")
    assert sizes(tmp_path / "out") == expected
    inputs = [tmp_path / "in" / f"{number}.tar" for number in range(3)]
    outputs = sorted((tmp_path / "out").glob("*.tar"))
    assert members_of(*outputs) == members_of(*inputs)
    read = webdataset.WebDataset([str(path) for path in outputs], shardshuffle=False)
    assert [sample["__key__"] for sample in read] == [f"{number:06d}" for number in range(19)]


def test_a_size_is_needed(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in")[0]
    with pytest.raises(UserError, match="--samples-per-shard or --shard-mb"):
        run(reshard, tars, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="positive"):
        run(reshard, tars, "--shard-mb", 0, "--out", tmp_path / "out")


def test_headers_say_nothing_of_who_made_the_input(tmp_path: Path) -> None:
    """Same samples, other times and owners in the headers: same bytes."""
    members = [("a.txt", b"x"), ("a.JPG", b"y"), ("b._1.txt", b"z"), ("b.seg.txt", b"")]
    for name, header in (("0", {"mtime": 5, "uname": "me"}), ("1", {"mtime": 9, "uid": 7, "mode": 0o777})):
        tar = write_members(tmp_path / name / "x.tar", *members, **header)
        run(reshard, tar, "--samples-per-shard", 9, "--out", tmp_path / name / "out")
    shards = [tmp_path / name / "out" / "000000.tar" for name in ("0", "1")]
    assert shards[0].read_bytes() == shards[1].read_bytes()
    assert members_of(shards[0]) == members


def test_odd_names_stay_as_they_are(tmp_path: Path) -> None:
    names = [
        "../evil.txt",
        "/root.txt",
        "deep/" * 60 + "x" * 120 + ".txt",
        "\u00e9\u4e2d.txt",
        "bytes\udcff.txt",
        "noext",
    ]
    tar = write_members(tmp_path / "x.tar", *[(name, name.encode("utf-8", "surrogateescape")) for name in names])
    run(reshard, tar, "--samples-per-shard", 9, "--out", tmp_path / "out")
    assert [name for name, _ in members_of(tmp_path / "out" / "000000.tar")] == names[:-1]
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path, tmp_path / "out"}


def test_neighbours_of_one_key_stay_apart(tmp_path: Path) -> None:
    """Joined in one shard, the last sample of a tar and the first of the next would be read as one."""
    for number in range(3):
        write_texts(tmp_path / f"{number}.tar", 7, 1)
    write_texts(tmp_path / "3.tar", 8, 2)
    run(reshard, f"{tmp_path}/*.tar", "--samples-per-shard", 10, "--out", tmp_path / "out")
    assert sizes(tmp_path / "out") == [1, 1, 3]
    assert not any(sample.defect for sample in samples_of(tmp_path / "out"))


def test_what_is_no_sample_is_left_behind(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
            for extension in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{name[0]}0.{extension}")
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
    run(reshard, tmp_path / "x.tar", "--samples-per-shard", 2, "--out", tmp_path / "out")
    assert [sample.name for sample in samples_of(tmp_path / "out")] == ["d0", "l0", "h0"]
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            assert all(info.isreg() for info in tar)


def test_broken_samples_are_counted(tmp_path: Path) -> None:
    members = [("a.txt", b"1"), ("b.txt", b"1"), ("b.TXT", b"2"), ("c.txt", bytes(3000)), ("d.txt", b"4")]
    tar = write_members(tmp_path / "x.tar", *members)
    run(reshard, tar, "--samples-per-shard", 9, "--max-member-mb", 2000 / 2**20, "--out", tmp_path / "out")
    assert [sample.name for sample in samples_of(tmp_path / "out")] == ["a", "d"]
    assert stats_of(tmp_path / "out") == {"success": 2, "duplicate member": 1, "member too large": 1}


def test_damaged_tars_give_what_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_pairs(tmp_path / f"{number}.tar", 10 * number, 10)
    damaged = tmp_path / "1.tar"
    damaged.write_bytes(damaged.read_bytes()[:30000])
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)
    whole = [sample.name for sample in read_samples(damaged)]
    run(reshard, f"{tmp_path}/*.tar", "--samples-per-shard", 4, "--out", tmp_path / "out")
    names = [sample.name for sample in samples_of(tmp_path / "out")]
    assert names == [f"{number:06d}" for number in range(10)] + whole and len(whole) == 7
    assert "damages of the tars, listed in defects.txt" in capsys.readouterr().out
    defects = (tmp_path / "out" / "defects.txt").read_text().splitlines()
    assert [Path(defect.partition(":")[0]).name for defect in defects] == ["1.tar", "2.tar"]


def test_damage_behind_a_sample_does_not_touch_it(tmp_path: Path) -> None:
    tar = write_pairs(tmp_path / "x.tar", 0, 4)
    data = bytearray(tar.read_bytes())
    start = data.index(b"000002.png")
    data[start : start + 512] = b"\xff" * 512
    tar.write_bytes(data)
    run(reshard, tar, "--samples-per-shard", 1, "--out", tmp_path / "out")
    names = [sample.name for sample in samples_of(tmp_path / "out")]
    assert names == [sample.name for sample in read_samples(tar)] and names[0] == "000000"


def test_tars_that_were_changed_are_refused(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "in")
    run(reshard, *tars, "--out", tmp_path / "out")
    write_pairs(tmp_path / "in" / "1.tar", 0, 12)
    with pytest.raises(UserError, match="the tars are others"):
        run(reshard, *tars, "--out", tmp_path / "out")


def test_without_any_sample(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(UserError, match=r"defects\.txt"):
        run(reshard, tmp_path / "x.tar", "--samples-per-shard", 2, "--out", tmp_path / "out")
    assert "gzip" in (tmp_path / "out" / "defects.txt").read_text()


@pytest.mark.parametrize(
    ("pattern", "option", "value"),
    [
        ("laion/0000[01].tar", "--samples-per-shard", 50),
        ("webvid/*.tar", "--shard-mb", 0.5),
        ("mmc4/*.tar", "--shard-mb", 1.0),
        ("yt_storyboard/*.tar", "--samples-per-shard", 2),
    ],
)
def test_real_shards_hold_the_same_samples(
    real_data: Path, tmp_path: Path, pattern: str, option: str, value: float
) -> None:
    run(reshard, str(real_data / pattern), option, value, "--out", tmp_path / "out")
    inputs, outputs = sorted(real_data.glob(pattern)), sorted((tmp_path / "out").glob("*.tar"))
    assert members_of(*outputs) == members_of(*inputs)
    assert samples_of(tmp_path / "out") == [sample for path in inputs for sample in read_samples(path)]
    for path, num_samples in zip(outputs, sizes(tmp_path / "out"), strict=True):
        if option == "--samples-per-shard":
            assert num_samples <= value
        else:  # an archive is padded to a multiple of 10 KiB
            assert path.stat().st_size <= value * 2**20 + 10240 or num_samples == 1
