"""The exported processor against the data pipeline: the model must see in use what it saw in training."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest

from data_pipelines.document import Document, Image, SampleKey, Text, TokenizedDocument
from data_pipelines.images import decode_image
from data_pipelines.packing import tokenize_documents
from data_pipelines.tokenizer import Tokenizer
from tests.inference.conftest import encoded, picture

KEY = SampleKey("source", 0, 0)


def rotated(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(orientation), "JPEG", exif=exif)


def translucent(mode: str) -> PIL.Image.Image:
    image = picture(1).convert("RGBA")
    image.putalpha(picture(2).convert("L"))
    return image.convert(mode)


def sixteen_bits() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(65536, size=(20, 30), dtype=np.uint16))


def with_transparent_colour() -> bytes:
    return encoded(picture(3).quantize(8), "PNG", transparency=2)


FILES = {
    **{f"orientation {n}": rotated(n) for n in range(1, 9)},
    "RGBA": encoded(translucent("RGBA")),
    "LA": encoded(translucent("LA")),
    "palette with a transparent colour": with_transparent_colour(),
    "gray": encoded(picture(4).convert("L"), "JPEG"),
    "one bit": encoded(picture(4).convert("1")),
    "16 bits": encoded(sixteen_bits()),
    "CMYK": encoded(picture(5).convert("CMYK"), "JPEG"),
    "animation": encoded(picture(6), "GIF", save_all=True, append_images=[picture(7)]),
    "WEBP": encoded(picture(8), "WEBP", lossless=True),
    "BMP": encoded(picture(9), "BMP"),
    "TIFF": encoded(picture(10), "TIFF"),
    "one pixel": encoded(picture(11, (1, 1))),
    "panorama": encoded(picture(12, (400, 9)), "JPEG"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_training(package: ModuleType, processor: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(FILES[name])
    expected = decode_image(Image(FILES[name]), image_size=24, max_pixels=10**6)
    read = package.images.read_image(path)
    pixels = np.asarray(processor.pixels([read, PIL.Image.open(path)])).astype(int)
    assert pixels.shape == (2, 3, 24, 24)
    # Training resizes by torch and use by Pillow: the same filter, which may round otherwise.
    assert np.abs(pixels - expected).max() <= 2


def test_token_ids_are_those_of_training(processor: Any, tokenizer: Tokenizer) -> None:
    prompts: list[list[Any]] = [
        ["a small red circle", picture(1), "left of", "it"],
        [picture(1), picture(2), "  what  is\nit? [IMG] </s> \u2603"],
        ["colour"],
    ]
    documents = [
        Document(tuple(Text(e) if isinstance(e, str) else Image(encoded(e)) for e in prompt)) for prompt in prompts
    ]
    keyed = [(KEY, 0, document) for document in documents]
    tokenized = tokenize_documents(keyed, tokenizer, num_queries=5, seq_len=128, max_images_per_row=4)
    inputs = processor(prompts)
    for ids, mask, document in zip(inputs.input_ids, inputs.attention_mask, tokenized, strict=True):
        assert isinstance(document, TokenizedDocument)
        assert [*ids[mask.bool()].tolist(), tokenizer.eos] == document.input_ids.tolist()
        num_padding = int((mask == 0).sum())
        assert (ids[:num_padding] == tokenizer.pad).all() and mask[num_padding:].all(), "padding stands on the left"
    assert inputs.images.shape == (3, 3, 24, 24)


def test_a_video_is_its_frames_one_after_another(processor: Any) -> None:
    frames = [picture(1), picture(2), picture(3)]
    video, pictures = processor([[frames, "red"]]), processor([[*frames, "red"]])
    assert video.input_ids.equal(pictures.input_ids) and video.images.equal(pictures.images)


def test_decoded_text_has_no_special_tokens(processor: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["a red circle"])[0]
    assert processor.decode([[tokenizer.image, *ids, tokenizer.pad], []]) == ["a red circle", ""]


@pytest.mark.parametrize(("content", "words"), [(None, "there is no image"), (b"no picture", "cannot be read")])
def test_unreadable_picture_is_one_sentence(
    package: ModuleType, content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(package.UserError, match=words) as caught:
        package.images.read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_picture_is_refused(package: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(FILES["RGBA"][:-200])
    with pytest.raises(package.UserError, match="cannot be read"):
        package.images.read_image(path)


def test_another_tokenizer_is_refused(package: ModuleType, exported: Path, tmp_path: Path) -> None:
    shutil.copy(exported / "config.json", tmp_path)
    with pytest.raises(package.UserError, match="tokenizer"):
        package.EmuProcessor.from_pretrained(tmp_path)
    text = (exported / "config.json").read_text()
    tokens = package.EmuConfig.from_pretrained(exported).tokens
    (tmp_path / "config.json").write_text(text.replace(f'"pad": {tokens.pad}', f'"pad": {tokens.pad + 1}'))
    shutil.copy(exported / "tokenizer.model", tmp_path)
    with pytest.raises(package.UserError, match="pieces"):
        package.EmuProcessor.from_pretrained(tmp_path)
