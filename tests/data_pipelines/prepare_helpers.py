"""Running the preparing commands in tests: small inputs, killed runs, what a folder holds."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from data_pipelines.document import RawSample
from data_pipelines.prepare import mmc4, reshard, storyboard, webvid
from tests.data_pipelines.corpora import write_pairs
from tests.data_pipelines.sources_helpers import picture, read_samples

TINY_MP4 = b"\0\0\0\x18ftypisom"  # as much of a video as preparing looks at


def run(module: ModuleType, *arguments: Any) -> None:
    with mock.patch.object(sys, "argv", [module.__name__, *map(str, arguments)]):
        module.main()


def files_of(out: Path) -> dict[str, bytes]:
    """What is to be seen in a folder: half-written files are hidden."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name[0] != "."}


def shards_of(out: Path) -> dict[str, list[RawSample]]:
    return {path.name: list(read_samples(path)) for path in sorted(out.glob("*.tar"))}


def samples_of(out: Path) -> list[RawSample]:
    return [sample for samples in shards_of(out).values() for sample in samples]


def stats_of(out: Path) -> dict[str, int]:
    """Entries by what became of them, and the notes, over all shards."""
    totals: dict[str, int] = {}
    for path in out.glob("*_stats.json"):
        stats = json.loads(path.read_text())
        assert stats["count"] == sum(stats["status_dict"].values())
        for name, number in (stats["status_dict"] | stats["notes"]).items():
            totals[name] = totals.get(name, 0) + number
    return totals


def run_killed(where: str, number: int, module: ModuleType, *arguments: Any) -> None:
    """Run a command in a process that kills itself at the n-th call of Path.replace (before | after) or addfile."""
    child = multiprocessing.get_context("fork").Process(
        target=_run_until_killed, args=(where, number, module, arguments)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL, child.exitcode


def _run_until_killed(where: str, number: int, module: ModuleType, arguments: tuple[Any, ...]) -> None:
    owner, name = (tarfile.TarFile, "addfile") if where == "addfile" else (Path, "replace")
    original = getattr(owner, name)
    calls = 0

    def counted(*values: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and where != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*values, **named)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    with mock.patch.object(owner, name, counted):
        run(module, *arguments)


def write_mmc4(folder: Path, num_pages: int = 7, num_files: int = 2) -> list[Any]:
    """Files of pages with two pictures each, the second of every third page missing."""
    for number in range(num_files):
        images = folder / "images" / str(number)
        images.mkdir(parents=True)
        pages = [page(number, place) for place in range(num_pages)]
        for place, made in enumerate(pages):
            for index, info in enumerate(made["image_info"]):
                if not (index == 1 and place % 3 == 0):
                    (images / info["image_name"]).write_bytes(picture((number, place, index)))
        write_pages(folder / f"docs_no_face_shard_{number}_v2.jsonl.zip", *pages)
    return [f"{folder}/docs_*.jsonl.zip", "--images", folder / "images", "--samples-per-shard", 3]


def page(number: int, place: int) -> dict[str, Any]:
    names = [f"{number}_{place}_{index}.jpg" for index in range(2)]  # png bytes: the name says nothing
    infos = [{"image_name": name, "matched_text_index": index, "matched_sim": 0.4} for index, name in enumerate(names)]
    return {
        "url": f"http://page.example/{number}/{place}",
        "text_list": [f"first {number} {place}", "second"],
        "image_info": infos,
        "similarity_matrix": [[0.4, 0.1], [0.1, 0.4]],
    }


def write_pages(path: Path, *pages: Any) -> Path:
    lines = "".join((made if isinstance(made, str) else json.dumps(made)) + "\n" for made in pages)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pages.jsonl", lines)
    return path


def write_webvid(folder: Path, num_rows: int = 11) -> list[Any]:
    """Every fourth video is missing; odd ones lie in their page's folder, even ones flat."""
    videos = folder / "videos"
    (videos / "000001_000050").mkdir(parents=True)
    rows = []
    for number in range(num_rows):
        rows.append([100 + number, f"caption, {number}", 1, "000001_000050", "PT00H00M03S", "http://v.example/x.mp4"])
        place = videos / "000001_000050" if number % 2 else videos
        if number % 4 != 3:
            (place / f"{100 + number}.mp4").write_bytes(TINY_MP4 + bytes([number]))
    with (folder / "results.csv").open("w", newline="") as stream:
        header = ["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"]
        csv.writer(stream).writerows([header, *rows])
    return [folder / "results.csv", "--videos", videos, "--samples-per-shard", 3]


def mhtml(*sheets: tuple[int, bytes], boundary: str = "0123456789abcdef") -> bytes:
    """The form of yt-dlp's writer: raw bytes, numbers in the Content-ID."""
    parts = [
        f'MIME-Version: 1.0\r\nContent-type: multipart/related; boundary="{boundary}"\r\n\r\n'.encode(),
        f"--{boundary}\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<html></html>\r\n".encode(),
    ]
    for number, sheet in sheets:
        head = f"Content-ID: <{number}.{boundary}@yt-dlp.github.io.invalid>\r\nContent-type: image/webp\r\n"
        length = f"Content-length: {len(sheet)}\r\n\r\n"
        parts.append(f"--{boundary}\r\n{head}{length}".encode() + sheet + b"\r\n")
    return b"".join([*parts, f"--{boundary}--\r\n".encode()])


def write_ytdlp_video(folder: Path, video_id: str, vtt: str | None = None, **changes: Any) -> dict[str, Any]:
    """A video of 12 seconds in sheets of 2 x 2 tiles of 8 x 6 pixels, a tile every 2 seconds; returns its info."""
    fragments = [
        {"url": "http://sb.example/0.jpg", "duration": 8.0},
        {"url": "http://sb.example/1.jpg", "duration": 4.0},
    ]
    board = {
        **{"format_id": "sb0", "protocol": "mhtml", "url": "http://sb.example/sb/x/storyboard3_L2/M0.jpg"},
        **{"width": 8, "height": 6, "fps": 0.5, "rows": 2, "columns": 2, "fragments": fragments},
    }
    info = {"id": video_id, "title": "a title", "duration": 12, "format_id": "sb0", "formats": [board], **changes}
    stem = f"a title [{video_id}]"
    (folder / f"{stem}.info.json").write_text(json.dumps(info))
    sheets = mhtml((0, picture((9, 9, 9), (16, 12))), (1, picture((5, 5, 5), (16, 6))))
    (folder / f"{stem}.mhtml").write_bytes(sheets)
    default = f"WEBVTT\n\n00:00:03.000 --> 00:00:04.000\nhello from {video_id}\n"
    (folder / f"{stem}.en.vtt").write_text(default if vtt is None else vtt)
    return info


def write_ytdlp(folder: Path, num_videos: int = 13) -> list[Any]:
    """The videos of one shard, 12, 1 and 3, are all silent: no tar comes of them."""
    for number in range(num_videos):
        place = folder / f"part{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        write_ytdlp_video(place, f"video{number:06d}", vtt="" if number in (1, 3, 12) else None)
    return [folder, "--samples-per-shard", 3]


def write_tars(folder: Path) -> list[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate((0, 9, 12)):
        write_pairs(folder / f"{number}.tar", first, (9, 3, 7)[number])
    return [f"{folder}/*.tar", "--samples-per-shard", 4]


COMMANDS: dict[str, tuple[ModuleType, Callable[[Path], list[Any]]]] = {
    "mmc4": (mmc4, write_mmc4),
    "webvid": (webvid, write_webvid),
    "storyboard": (storyboard, write_ytdlp),
    "reshard": (reshard, write_tars),
}
