"""Storyboards from yt-dlp's files and from those of Emu's tools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf import UserError
from data_pipelines.document import Document, RawSample
from data_pipelines.images import decode_image
from data_pipelines.prepare import storyboard
from data_pipelines.prepare.ytdlp_files import read_sheets
from data_pipelines.sources.common import SampleError
from data_pipelines.sources.storyboard_forms import read_timeline
from tests.data_pipelines.prepare_helpers import mhtml, run, samples_of, stats_of, write_ytdlp, write_ytdlp_video
from tests.data_pipelines.sources_helpers import picture, read_samples, rng, source
from tests.data_pipelines.test_subtitles import ROLLING

STEM = "a title [video000000]"


def prepare(folder: Path, *arguments: Any) -> dict[str, int]:
    """What became of the videos of a folder, one of which can always be used."""
    write_ytdlp_video(folder, "always-good")
    run(storyboard, folder, *arguments, "--out", folder.parent / "out")
    counts = stats_of(folder.parent / "out")
    return {name: number for name, number in counts.items() if "named by" not in name and name != "success"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


def made(folder: Path) -> RawSample:
    """The sample of the other video."""
    return next(sample for sample in samples_of(folder.parent / "out") if sample.name != "always-good")


def test_videos_of_all_folders(tmp_path: Path) -> None:
    run(storyboard, *write_ytdlp(tmp_path / "downloads"), "--out", tmp_path / "out")
    names = [sample.name for sample in samples_of(tmp_path / "out")]
    assert names == [f"video{number:06d}" for number in (0, 2, 4, 6, 8, 10, 5, 7, 9, 11)]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        f"yt_sb-{number:05d}.tar" for number in (0, 1, 3, 4)
    ]
    counts = stats_of(tmp_path / "out")
    assert (counts["success"], counts["no subtitles"]) == (10, 3)


def test_times_and_texts(folder: Path) -> None:
    """A tile every 2 seconds; the last sheet is one row."""
    write_ytdlp_video(folder, "video000000")
    assert prepare(folder) == {"subtitles by a machine": 2}
    timeline = read_timeline(made(folder))
    assert timeline.texts == ["", "", "hello from video000000", "", "", "", ""]
    boxes = [picture.box for picture in timeline.pictures]
    assert boxes == [(0, 0, 8, 6), (8, 0, 16, 6), (0, 6, 8, 12), (8, 6, 16, 12), (0, 0, 8, 6), (8, 0, 16, 6)]
    story = json.loads(made(folder).members["json"])["storyboard"]
    assert (story["interval"], story["count"], story["level"], story["columns"]) == (2, 6, 2, 2)
    assert story["sheets"][1] == {"columns": 2, "rows": 1, "count": 2, "ext": "png"}
    members = {name: member for name, member in made(folder).members.items() if name != "json"}
    assert members == {"sb_0.png": picture((9, 9, 9), (16, 12)), "sb_1.png": picture((5, 5, 5), (16, 6))}


def test_the_interval_is_the_share_of_the_duration(folder: Path) -> None:
    """24 seconds in 6 tiles; one tile more or less would give 3 or 5 seconds."""
    info = write_ytdlp_video(folder, "video000000")
    info["formats"][0] |= {"fps": 0.25, "fragments": [{"duration": 16.0}, {"duration": 8.0}]}
    (folder / f"{STEM}.info.json").write_text(json.dumps(info))
    prepare(folder)
    story = json.loads(made(folder).members["json"])["storyboard"]
    assert (story["interval"], story["count"]) == (4, 6)


def test_neighbours_of_one_key_would_be_read_as_one_sample(folder: Path) -> None:
    """Also where what stands between them gives no sample."""
    for place, video_id, vtt in (("1", "twin", None), ("2", "silent", ""), ("3", "twin", None), ("4", "other", None)):
        (folder / place).mkdir()
        write_ytdlp_video(folder / place, video_id, vtt)
    counts = prepare(folder)
    assert (counts["same key as the sample before"], counts["no subtitles"]) == (1, 1)
    assert [sample.name for sample in samples_of(folder.parent / "out")] == ["always-good", "twin", "other"]


def test_a_sheet_that_failed_is_told_by_its_number(folder: Path) -> None:
    write_ytdlp_video(folder, "video000000")
    (folder / f"{STEM}.mhtml").write_bytes(mhtml((1, picture((5, 5, 5), (16, 6)))))
    assert prepare(folder)["sheet missing"] == 1
    timeline = read_timeline(made(folder))
    assert len(timeline.pictures) == 2 and timeline.texts == ["hello from video000000", "", ""]


def test_sheets_are_kept_to_the_byte() -> None:
    """Raw bytes between the boundaries, line ends of all kinds among them."""
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    sheets = {0: b"\xff\xd8\xff" + noise + b"\r\n", 3: noise + b"\n", 12: b"\r\n--" + noise, 2: b"From a\n.\n\r\r\n"}
    assert read_sheets(mhtml(*sheets.items())) == sheets


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"no mhtml at all",
        mhtml((0, picture()))[:300],
        mhtml((0, b"")),
        mhtml((0, picture())).replace(b"image/webp", b"text/html"),
        mhtml((0, picture())).replace(b"Content-ID: <0.", b"Content-ID: <-1."),
        mhtml((0, picture())).replace(b"boundary=", b"boundary*0*=x'y'"),
        mhtml((0, picture())).replace(b"Content-length: ", b"Content-length: 9"),
        mhtml((0, picture())).replace(b"Content-length: ", b"Content-length: x"),
        mhtml((0, picture())).replace(b"MIME-Version", b"x" * 20_000),
        b"Content-Type: multipart/related; boundary=" + b"a" * 10_000 + b"\r\n\r\n",
        b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(2000)),
        b"Content-Type: message/rfc822\r\n\r\n" * 2000,
    ],
)
def test_hostile_mhtml(folder: Path, hostile: bytes) -> None:
    write_ytdlp_video(folder, "video000000")
    (folder / f"{STEM}.mhtml").write_bytes(hostile)
    counts = prepare(folder)
    assert counts.pop("subtitles by a machine") == 1
    assert list(counts.values()) == [1]
    assert set(counts) <= {"no sheet", "mhtml does not parse", "sheet: not an image", "sheet smaller than its tiles"}


def test_too_many_sheets_are_refused() -> None:
    with pytest.raises(SampleError, match="unlikely"):
        read_sheets(mhtml(*((number, b"x") for number in range(1001))))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "../../evil"}, "video id has an unsafe name"),
        ({"id": "a.b"}, "video id has an unsafe name"),
        ({"formats": []}, "info.json names no storyboard"),
        ({"formats": None}, "info.json names no storyboard"),
        ({"formats": 3}, "malformed"),
        ({"formats": [[]]}, "malformed"),
        ({"width": 0}, "malformed"),
        ({"width": 9}, "sheet smaller than its tiles"),
        ({"width": 8.5}, "malformed"),
        ({"fps": 7 / 12}, "sheet smaller than its tiles"),  # a third tile in a sheet of two
        ({"fps": 9 / 12}, "tiles and sheets do not agree"),  # one more than two sheets hold
        ({"fps": 4 / 12}, "tiles and sheets do not agree"),  # none is left for the second sheet
        ({"fps": 1e300}, "tiles and sheets do not agree"),
        ({"fps": float("nan")}, "malformed"),
        ({"columns": 10**5, "rows": 10**5}, "unlikely grid"),
        ({"fragments": [{"duration": 1.0}] * 2000}, "unlikely number of sheets"),
        ({"fragments": [{"duration": 0}]}, "malformed"),
    ],
)
def test_hostile_info(folder: Path, changes: dict[str, Any], reason: str) -> None:
    info = write_ytdlp_video(folder, "video000000")
    for key, value in changes.items():
        target = info if key in ("id", "formats") else info["formats"][0]
        target[key] = value
    (folder / f"{STEM}.info.json").write_text(json.dumps(info))
    assert prepare(folder) == {reason: 1, "subtitles by a machine": 1}


def test_missing_and_broken_files(folder: Path) -> None:
    for number, extension in enumerate(("mhtml", "en.vtt")):
        write_ytdlp_video(folder, f"missing{number}")
        (folder / f"a title [missing{number}].{extension}").unlink()
    (folder / "broken.info.json").write_text("{")
    (folder / "list.info.json").write_text("[]")
    (folder / "latin.info.json").write_bytes(b'{"id": "\xff"}')
    (folder / "outside.info.json").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe.info.json")
    assert prepare(folder) == {
        **{"mhtml missing": 1, "no subtitles": 1, "info.json is no json": 2, "info.json is no json object": 1},
        **{"info.json lies outside its folder": 1, "info.json is no regular file": 1, "subtitles by a machine": 1},
    }


def test_rolling_captions_are_told_once(folder: Path) -> None:
    write_ytdlp_video(folder, "video000000", ROLLING)
    prepare(folder)
    meta = json.loads(made(folder).members["json"])
    assert [line["text"] for line in meta["subtitles"]] == ["so here we are", "no no", "no no", "the end"]
    assert meta["is_auto"] is True


def test_which_subtitles_are_taken(folder: Path) -> None:
    """What people wrote before what a machine wrote, json3 before vtt, the language that was asked for."""
    info = write_ytdlp_video(folder, "video000000", subtitles={"de": [], "en-GB": [], "../../evil": []})
    cue = "WEBVTT\n\n00:01.000 --> 00:02.000\n"
    (folder / f"{STEM}.en-GB.vtt").write_text(cue + "vtt")
    (folder / f"{STEM}.de.vtt").write_text(cue + "deutsch")
    events = {"events": [{"tStartMs": 1000, "dDurationMs": 10, "segs": [{"utf8": "json3"}]}]}
    (folder / f"{STEM}.en-GB.json3").write_text(json.dumps(events))
    assert prepare(folder) == {"subtitles by people": 1, "subtitles by a machine": 1}
    assert json.loads(made(folder).members["json"])["subtitles"][0]["text"] == "json3"
    (folder / f"{STEM}.info.json").write_text(json.dumps({**info, "subtitles": {"de": []}}))
    run(storyboard, folder, "--language", "de", "--out", folder.parent / "german")
    assert b"deutsch" in samples_of(folder.parent / "german")[0].members["json"]


def test_wrong_arguments(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*\.info\.json"):
        run(storyboard, folder, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="both --transcripts and --labels"):
        run(storyboard, folder, "--labels", folder, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="language code"):
        run(storyboard, folder, "--language", "../en", "--out", tmp_path / "out")


def test_real_downloads_are_the_ready_made_documents(real_data: Path, tmp_path: Path) -> None:
    """Same pictures, tiles, times and texts. Inherent difference: the interval was told there and is rounded here."""
    run(storyboard, real_data / "yt_storyboard" / "ytdlp", "--out", tmp_path / "out")
    mine = {sample.name: sample for sample in samples_of(tmp_path / "out")}
    ready = {sample.name: sample for sample in read_samples(real_data / "yt_storyboard" / "yt_sb-000000.tar")}
    assert set(ready) - set(mine) == {"SkvideoReel"} and len(mine) == 3
    read = source("storyboard")
    for name, sample in mine.items():
        assert read_timeline(sample) == read_timeline(ready[name])
        for seed in range(5):
            document = read(sample, rng(seed))
            assert isinstance(document, Document) and document == read(ready[name], rng(seed))
        meta, other = json.loads(sample.members["json"]), json.loads(ready[name].members["json"])
        assert meta["storyboard"].pop("interval_source") == "round" != other["storyboard"].pop("interval_source")
        assert meta == other


def write_emu_files(real_data: Path, folder: Path) -> None:
    """The files from which Emu's own maker made the real tar of single frames, taken back out of it."""
    for place in ("00000", "transcripts", "labels"):
        (folder / place).mkdir(parents=True)
    sheets = {sample.name: sample for sample in read_samples(real_data / "yt_storyboard" / "yt_sb-000000.tar")}
    for number, sample in enumerate(read_samples(real_data / "yt_storyboard" / "0000000.tar")):
        meta = json.loads(sample.members["final_meta.json"])
        key, video = f"{number:09d}", f"https://www.youtube.com/watch?v={meta['id']}"
        record = {"url": video, "key": key, "status": "success", "yt_meta_dict": {"sb": meta["sb"]}}
        (folder / "00000" / f"{key}.json").write_text(json.dumps(record))
        for name, sheet in sheets[meta["id"]].members.items():
            if name.startswith("sb_"):
                (folder / "00000" / f"{key}_{name.removeprefix('sb_')}").write_bytes(sheet)
        (folder / "transcripts" / f"{meta['id']}.json").write_text(json.dumps(meta["subtitle"]))
        (folder / "labels" / f"{meta['id']}.json").write_text(json.dumps({"duration": meta["duration"]}))


def test_real_files_of_emu_are_what_its_own_maker_makes(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "emu"
    write_emu_files(real_data, folder)
    (folder / "00000" / "000000009.json").write_text(json.dumps({"url": "x", "status": "failed_to_download"}))
    folders = ("--transcripts", folder / "transcripts", "--labels", folder / "labels")
    run(storyboard, folder, *folders, "--out", tmp_path / "out")
    counts = stats_of(tmp_path / "out")
    assert (counts["success"], counts["json names no storyboard"]) == (3, 1)
    split = {sample.name: read_timeline(sample) for sample in read_samples(real_data / "yt_storyboard" / "0000000.tar")}
    for sample in samples_of(tmp_path / "out"):
        timeline = read_timeline(sample)
        assert timeline.texts == split[sample.name].texts
        for tile, frame in zip(timeline.pictures, split[sample.name].pictures, strict=True):
            np.testing.assert_array_equal(decode_image(tile, 16, 10**8), decode_image(frame, 16, 10**8))


def test_emu_files_that_lack_something(folder: Path) -> None:
    for place in ("transcripts", "labels"):
        (folder / place).mkdir()
    grid = {"0": [16, 12, 2, 2, 4, "webp"], "1": [16, 6, 2, 1, 2, "webp"]}
    for number, video in enumerate(
        ("complete-00", "no-label-00", "no-subs-000", "no-sheet-00", "..%2Fevil", "silent-0000")
    ):
        record = {"url": f"https://youtu.be/{video}?t=3", "yt_meta_dict": {"sb": grid}}
        (folder / f"{number}.json").write_text(json.dumps(record))
        if video != "no-sheet-00":
            (folder / f"{number}_1.webp").write_bytes(picture((5, 5, 5), (16, 6)))
        if video != "no-label-00":
            (folder / "labels" / f"{video}.json").write_text('{"duration": 12}')
        spoken = [] if video == "silent-0000" else [{"text": "after all sheets", "start": 11.0, "duration": 1}]
        if video != "no-subs-000":
            (folder / "transcripts" / f"{video}.json").write_text(json.dumps(spoken))
    (folder / "6.json").write_text(json.dumps({"url": "youtu.be/hostile-000", "yt_meta_dict": {"sb": {"0": [0] * 5}}}))
    folders = ("--transcripts", folder / "transcripts", "--labels", folder / "labels")
    run(storyboard, folder, *folders, "--out", folder.parent / "out")
    counts = stats_of(folder.parent / "out")
    assert counts == {
        **{"success": 1, "label missing": 1, "transcript missing": 1, "no sheet": 1, "json names no video": 1},
        **{"no subtitles": 1, "malformed": 1, "sheet missing": 1, "sheets named by the storyboards": 2},
    }
    timeline = read_timeline(samples_of(folder.parent / "out")[0])
    assert len(timeline.pictures) == 2 and timeline.texts == ["", "", "after all sheets"]
