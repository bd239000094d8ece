"""`python -m emu_inference`, in this process, in one without the training packages, and in a clean environment."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.inference.conftest import picture

WITHOUT_TRAINING_PACKAGES = Path(__file__).with_name("without_training_packages.py")
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def main(package: ModuleType) -> Callable[..., int]:
    return importlib.import_module("emu_inference.__main__").main


def test_caption_prints_a_line_for_each_image(
    main: Callable[..., int], model: Any, processor: Any, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", *photos, "--batch-size", "2"]) == 0
    expected = processor.decode(model.generate(processor([[picture(i)] for i in range(5)])))
    # Not splitlines: an untrained model may well say a vertical tab.
    assert capsys.readouterr().out == "".join(f"{p}: {t}\n" for p, t in zip(photos, expected, strict=True))


def test_caption_continues_the_prompt_with_the_options_given(
    main: Callable[..., int],
    package: ModuleType,
    model: Any,
    processor: Any,
    photos: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--prompt", "a red", "--decoding", "emu", "--num-beams", "2", "--max-new-tokens", "4", "--json"]
    assert main(["caption", photos[0], *options]) == 0
    decoding = package.GenerationOptions(num_beams=2, max_new_tokens=4, length_penalty=0.0)
    (expected,) = processor.decode(model.generate(processor([[picture(0), "a red"]]), decoding))
    assert json.loads(capsys.readouterr().out) == {"image": photos[0], "text": expected}


def test_answer_continues_image_and_question(
    main: Callable[..., int], model: Any, processor: Any, photos: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["answer", photos[1], "what colour is it"]) == 0
    (expected,) = processor.decode(model.generate(processor([[picture(1), "what colour is it"]])))
    assert capsys.readouterr().out == expected + "\n"


def test_embed_writes_the_embeddings_of_images(
    main: Callable[..., int], model: Any, processor: Any, photos: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "images.safetensors"
    assert main(["embed", "--image", *photos, "--out", str(out), "--batch-size", "2"]) == 0
    expected = model.encode_images(processor.pixels([picture(i) for i in range(5)]))
    torch.testing.assert_close(load_file(out)["embeddings"], expected, **TOLERANCE)
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["inputs"]) == photos


def test_embed_writes_the_regressed_embeddings_of_texts(
    main: Callable[..., int], model: Any, processor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, texts = tmp_path / "texts.safetensors", ["a red circle", "", "what is left of the large blue square"]
    assert main(["embed", "--text", *texts, "--out", str(out), "--batch-size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [3, 5, 64]
    expected = model.regress_image(processor([[text] for text in texts]))
    torch.testing.assert_close(load_file(out)["embeddings"], expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["caption", "nowhere.png"], "nowhere.png"),
        (["caption", __file__], "cannot be read as an image"),
        (["caption", "a.png", "--model", "/nowhere"], "holds no exported model"),
        (["caption", "a.png", "--device", "abacus"], "--device abacus"),
        (["embed", "--text", "a", "--out", "/nowhere/x.safetensors"], "--out"),
    ],
)
def test_wrong_input_is_one_sentence_and_code_2(
    main: Callable[..., int], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_explains_each_command(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in ([], "embed"), (["caption"], "--prompt"), (["answer"], "QUESTION"), (["embed"], "--text"):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--help"])
        assert caught.value.code == 0 and word in capsys.readouterr().out


@pytest.mark.slow
def test_no_training_package_is_needed(exported: Path, processor: Any, model: Any, photos: list[str]) -> None:
    command = [sys.executable, str(WITHOUT_TRAINING_PACKAGES), "emu_inference", "caption", photos[0], "--json"]
    result = subprocess.run(command, cwd=exported, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = processor.decode(model.generate(processor([[picture(0)]])))[0]
    assert json.loads(result.stdout)["text"] == expected
    refused = [sys.executable, str(WITHOUT_TRAINING_PACKAGES), "trainer.export", "--help"]
    assert "No module named" in subprocess.run(refused, capture_output=True, text=True, check=False).stderr


@pytest.mark.slow
@pytest.mark.clean_env
def test_a_clean_environment_is_enough(exported: Path, photos: list[str], tmp_path: Path) -> None:
    """A virtual environment that has the exported package and what it names, called from a folder elsewhere."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    folder = shutil.copytree(exported, tmp_path / "emu")  # building leaves files in it
    installed = run("-m", "pip", "install", "torch==2.13.0", str(folder))
    if installed.returncode:
        pytest.skip(f"pip cannot install here: {installed.stderr.strip().splitlines()[-1]}")
    result = run("-m", "emu_inference", "caption", *photos, "--model", str(folder))
    assert result.returncode == 0, result.stderr
    assert all(f"{photo}: " in result.stdout for photo in photos)
    assert "No module named" in run("-c", "import deepspeed").stderr
