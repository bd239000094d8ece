"""The demo's corpora: always the same bytes, the formats of their kinds, and nothing held out in any picture."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import sentencepiece
import webdataset
from omegaconf import OmegaConf
from PIL import Image

from conf import UserError
from data_pipelines.config import DataConfig
from data_pipelines.document import Document, RawSample, Skip
from data_pipelines.prepare import demo
from data_pipelines.prepare.demo_corpora import photos, webvid
from data_pipelines.prepare.drawn_world import COLOURS, PLACES, SHAPES, SIZES, is_held_out, parse_caption
from data_pipelines.sources import make_source
from tests.data_pipelines.scene_reader import Seen, read_scene

SCALE = 0.05
IMG2DATASET_KEYS = [
    *["WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark"],
    *["caption", "url", "key", "status", "error_message", "width", "height"],
    *["original_width", "original_height", "exif", "sha256"],
]
LINK_WORDS = {"a", "an", "at", "the", "there", "is", "and", "moves", "from", "to"}
DRAWN = ("laion", "mmc4", "webvid", "storyboard")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpora"
    assert demo.prepare(out, SCALE)
    return out


def read_tar(path: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False))


def read_corpus(corpora: Path, name: str) -> list[dict[str, Any]]:
    return [sample for path in sorted((corpora / name).glob("*.tar")) for sample in read_tar(path)]


def open_image(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def frames_of(encoded: bytes) -> list[Image.Image]:
    with av.open(io.BytesIO(encoded)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def tiles_of(sample: dict[str, Any]) -> list[Image.Image]:
    """Tiles of a storyboard sample in raw form, in time order."""
    board = json.loads(sample["json"])["storyboard"]
    width, height = board["tile_width"], board["tile_height"]
    tiles = []
    for number, sheet in enumerate(board["sheets"]):
        image = open_image(sample[f"sb_{number}.{sheet['ext']}"])
        assert image.size == (sheet["columns"] * width, sheet["rows"] * height)
        for k in range(sheet["count"]):
            row, column = divmod(k, sheet["columns"])
            tiles.append(image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height)))
    return tiles


def pictures_of(sample: dict[str, Any]) -> Iterator[Image.Image]:
    """Every picture, tile and frame of a sample of any drawn corpus."""
    if "mp4" in sample:
        yield from frames_of(sample["mp4"])
    elif any(name.startswith("sb_") for name in sample):
        yield from tiles_of(sample)
    else:
        infos = json.loads(sample.get("json", b"{}")).get("image_info", [])
        encoded = [base64.b64decode(info["image_base64"]) for info in infos if "image_base64" in info]
        encoded += [member for name, member in sample.items() if name.endswith(("jpg", "png"))]
        yield from map(open_image, encoded)


def held_out_places(seen: Seen) -> set[str]:
    return {place for place in seen.places if is_held_out(seen.colour, seen.shape, place)}


def triples(objects: list[Any]) -> list[tuple[str, str, str]]:
    return sorted((thing.colour, thing.shape, thing.place) for thing in objects)


@pytest.mark.slow
def test_two_runs_give_the_same_bytes_and_another_seed_does_not(corpora: Path, tmp_path: Path) -> None:
    demo.prepare(tmp_path / "again", SCALE)
    files = sorted(path.relative_to(corpora) for path in corpora.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    assert all((corpora / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    one, other = next(demo.laion.samples(1, seed=0)), next(demo.laion.samples(1, seed=1))
    assert one.members["jpg"] != other.members["jpg"]


def test_the_manifest_tells_every_file(corpora: Path) -> None:
    manifest = json.loads((corpora / "manifest.json").read_text())
    names = {path.relative_to(corpora).as_posix() for path in corpora.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == names - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((corpora / name).read_bytes()).hexdigest()
    for name in (*DRAWN, "photos"):
        assert manifest["samples"][name] == len(read_corpus(corpora, name)) == demo.SAMPLES[name] * SCALE


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_no_picture_of_a_training_corpus_shows_a_held_out_triple(corpora: Path, name: str) -> None:
    pictures = [picture for sample in read_corpus(corpora, name) for picture in pictures_of(sample)]
    scenes = [read_scene(picture) for picture in pictures]
    assert len(scenes) >= 150
    assert all(scenes), "a picture without any object"
    assert not [seen for scene in scenes for seen in scene if held_out_places(seen)]


def test_no_text_of_a_training_corpus_names_a_held_out_triple(corpora: Path) -> None:
    sentences = [sample["txt"].decode() for name in ("laion", "photos") for sample in read_corpus(corpora, name)]
    for sample in read_corpus(corpora, "mmc4"):
        sentences += json.loads(sample["json"])["text_list"]
    for sample in read_corpus(corpora, "storyboard"):
        meta = json.loads(sample.get("json") or sample["final_meta.json"])
        sentences += [subtitle["text"] for subtitle in meta.get("subtitles") or meta["subtitle"]]
    objects = [found for sentence in sentences for found in parse_caption(sentence) if found.place]
    assert len(objects) > 900
    assert not any(is_held_out(found.colour, found.shape, found.place) for found in objects)


def test_laion_has_the_members_and_keys_of_img2dataset(corpora: Path) -> None:
    (path,) = sorted((corpora / "laion").glob("*.tar"))
    samples = read_tar(path)
    assert json.loads(path.with_name("00000_stats.json").read_text())["successes"] == len(samples)
    for number, sample in enumerate(samples):
        meta = json.loads(sample["json"])
        assert sample["__key__"] == meta["key"] == f"{number:09d}"
        assert list(meta) == IMG2DATASET_KEYS
        assert meta["sha256"] == hashlib.sha256(sample["jpg"]).hexdigest()
        assert (meta["caption"], meta["status"]) == (sample["txt"].decode(), "success")
        assert open_image(sample["jpg"]).size == (meta["width"], meta["height"]) == (128, 128)


@pytest.mark.slow
def test_laion_captions_say_what_the_pictures_show(corpora: Path) -> None:
    counts: dict[int, int] = defaultdict(int)
    for sample in read_corpus(corpora, "laion"):
        seen = read_scene(open_image(sample["jpg"]))
        assert triples(seen) == triples(parse_caption(sample["txt"].decode()))
        counts[len(seen)] += 1
    np.testing.assert_allclose([counts[number] / 600 for number in (1, 2, 3)], [0.40, 0.55, 0.05], atol=0.05)


def test_mmc4_pages_are_consistent_in_both_forms(corpora: Path) -> None:
    scores = []
    for name, lean in (("000000000.tar", False), ("lean-000000.tar", True)):
        for sample in read_tar(corpora / "mmc4" / name):
            page = json.loads(sample["json"])
            infos, matrix = page["image_info"], page["similarity_matrix"]
            assert 2 <= len(infos) <= 5
            assert all(len(row) == len(page["text_list"]) for row in matrix)
            assert len(matrix) == len(infos)
            matched = [info["matched_text_index"] for info in infos]
            assert matched != sorted(matched)
            assert all(("image_base64" in info) is not lean for info in infos)
            pictures = list(pictures_of(sample))
            assert len(pictures) == len(infos)
            for info, row, picture in zip(infos, matrix, pictures, strict=True):
                sentence = info["matched_text_index"]
                assert info["matched_sim"] == row[sentence] == max(row)
                described = triples(parse_caption(page["text_list"][sentence]))
                assert (described == triples(read_scene(picture))) or row[sentence] < 0.32
                scores.append(row[sentence])
    assert 0.03 < np.mean(np.array(scores) < 0.32) < 0.2


def test_webvid_clips_move_as_their_captions_say_and_failures_lack_the_video(corpora: Path) -> None:
    (path,) = sorted((corpora / "webvid").glob("*.tar"))
    stats = json.loads(path.with_name("00000_stats.json").read_text())
    samples = read_tar(path)
    failed = [sample for sample in samples if "mp4" not in sample]
    assert (len(samples), len(failed)) == (stats["count"], stats["count"] - stats["successes"]) == (20, 2)
    for sample in samples:
        meta = json.loads(sample["json"])
        assert list(meta)[4:] == ["caption", "url", "key", "status", "error_message", "yt_meta_dict"]
        assert (meta["status"] == "success") == ("mp4" in sample)
        if "mp4" not in sample:
            continue
        frames = frames_of(sample["mp4"])
        assert [frame.size for frame in frames] == [(128, 128)] * 18
        (first,), (last,) = read_scene(frames[0]), read_scene(frames[-1])
        assert first[:2] == last[:2]
        caption = sample["txt"].decode()
        assert f"{first.colour} {first.shape}" in caption
        assert f"from the {first.place} " in caption
        assert caption.partition("to the ")[2] == last.place


def test_no_move_of_any_clip_comes_near_a_held_out_place() -> None:
    moves = webvid.trained_moves()
    assert {(colour, shape) for colour, shape, _, _ in moves} == {(c, s) for c in COLOURS for s in SHAPES}
    assert webvid.places_on_way("left", "right") == {"left", "centre", "right"}
    assert webvid.places_on_way("top", "right") == {"top", "right", "top right", "centre"}
    assert all(not is_held_out(*move[:2], place) for move in moves for place in webvid.places_on_way(*move[2:]))


def test_raw_storyboards_are_cropped_and_subtitles_tell_what_is_seen(corpora: Path) -> None:
    for sample in read_tar(corpora / "storyboard" / "yt_sb-000000.tar"):
        meta = json.loads(sample["json"])
        board, tiles = meta["storyboard"], tiles_of(sample)
        assert sample["__key__"] == meta["video_id"]
        assert len(tiles) == board["count"] == sum(sheet["count"] for sheet in board["sheets"])
        assert meta["duration"] == board["count"] * board["interval"]
        last = board["sheets"][-1]
        assert (last["columns"], last["rows"]) == (min(5, last["count"]), -(-last["count"] // 5))
        for subtitle in meta["subtitles"]:
            tile = tiles[round(subtitle["start"] / board["interval"])]
            assert triples(read_scene(tile)) == triples(parse_caption(subtitle["text"]))


def test_split_storyboards_put_the_text_before_the_frame_that_follows_it(corpora: Path) -> None:
    for sample in read_tar(corpora / "storyboard" / "0000000.tar"):
        meta = json.loads(sample["final_meta.json"])
        assert sample["__key__"] == meta["id"]
        interval = round(meta["duration"] / meta["frame_num"])
        events = [(i * interval, 0, f"frame {i}") for i in range(meta["frame_num"])]
        events += [(subtitle["start"], 1, subtitle["text"]) for subtitle in meta["subtitle"]]
        expected, said = {}, []
        for _, kind, what in sorted(events, key=lambda event: event[:2]):
            if kind:
                said.append(what)
            else:
                expected[what.removeprefix("frame ") + ".txt"], said = " ".join(said), []
        if said:
            expected[f"{meta['frame_num']}.txt"] = " ".join(said)
        assert {name: text.decode() for name, text in sample.items() if name.endswith(".txt")} == expected
        assert sum(name.endswith(".png") for name in sample) == meta["frame_num"]


@pytest.mark.parametrize(("name", "count"), [("heldout", 15), ("train_probe", 5)])
def test_judging_scenes_show_what_they_say(corpora: Path, name: str, count: int) -> None:
    scenes = [json.loads(line) for line in (corpora / name / "scenes.jsonl").read_text().splitlines()]
    assert len(scenes) == count
    for scene in scenes:
        drawn = sorted((thing["colour"], thing["shape"], thing["place"]) for thing in scene["objects"])
        assert drawn == triples(read_scene(open_image((corpora / name / scene["file"]).read_bytes())))
        assert drawn == triples(parse_caption(scene["caption"]))
        assert sum(is_held_out(*triple) for triple in drawn) == (1 if name == "heldout" else 0)


def test_retrieval_groups_hold_32_scenes_that_differ(tmp_path: Path) -> None:
    demo.heldout.write_scenes(tmp_path, "heldout", 300, seed=0)
    scenes = [json.loads(line) for line in (tmp_path / "scenes.jsonl").read_text().splitlines()]
    assert [len(scene["objects"]) for scene in scenes].count(1) == 200
    groups = json.loads((tmp_path / "retrieval.json").read_text())
    assert len(groups) == 9
    assert len({number for group in groups for number in group}) == 9 * 32
    for group in groups:
        contents = [
            frozenset((thing["colour"], thing["shape"], thing["place"]) for thing in scenes[number]["objects"])
            for number in group
        ]
        assert len(set(contents)) == 32


def test_the_tokenizer_has_llamas_layout_and_whole_words(corpora: Path) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(corpora / "tokenizer.model"))
    ids = (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (0, 1, 2, -1)
    assert tokenizer.id_to_piece(3) == "<0x00>"
    assert tokenizer.get_piece_size() <= 512
    words = {*COLOURS, *SHAPES, *SIZES, *" ".join(PLACES).split(), *LINK_WORDS}
    assert not [word for word in words if len(tokenizer.encode(word)) > 1]
    text = "a  red circle, at the top left; crème brûlée 42"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def demo_config() -> DataConfig:
    path = Path(__file__).parents[2] / "conf" / "data" / "demo.yaml"
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(path)))


@pytest.mark.parametrize("name", ["laion", "mmc4", "webvid", "storyboard", "photos"])
def test_the_sources_read_every_sample(corpora: Path, name: str) -> None:
    config = demo_config()
    assert config.sources[name].shards.startswith(f"outputs/demo/corpora/{name}/")
    source = make_source(name, config.sources[name], config)
    for sample in read_corpus(corpora, name):
        members = {key: value for key, value in sample.items() if not key.startswith("__")}
        document = source(RawSample(sample["__key__"], members), np.random.default_rng(0))
        if "mp4" not in members and name == "webvid":
            assert document == Skip("no video")
        elif isinstance(document, Skip):
            assert (name, document.reason) == ("mmc4", "no picture above the similarity threshold")
        else:
            assert isinstance(document, Document)


def test_a_second_run_changes_nothing_and_other_settings_are_refused(corpora: Path) -> None:
    before = (corpora / "manifest.json").stat().st_mtime_ns
    assert not demo.prepare(corpora, SCALE)
    assert (corpora / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        demo.prepare(corpora, SCALE, seed=1)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not made by this command"):
        demo.prepare(tmp_path, SCALE)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SAMPLES", dict.fromkeys(demo.SAMPLES, 100))
    with monkeypatch.context() as broken:
        broken.setattr(demo, "train_tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo.prepare(tmp_path / "out", SCALE)
    assert not (tmp_path / "out").exists()
    assert demo.prepare(tmp_path / "out", SCALE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lost_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SAMPLES", dict.fromkeys(demo.SAMPLES, 100))
    demo.prepare(tmp_path / "out", SCALE)
    (tmp_path / "out" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model is missing"):
        demo.prepare(tmp_path / "out", SCALE)


def test_missing_photographs_name_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        next(photos.samples(1, seed=0))
