"""Ask the exported package about drawn scenes: ``python -m benchmarks.demo.predict --out outputs/demo``.

The package runs in processes of its own in which the packages of training cannot be imported. It captions every image,
encodes every image, and regresses the image that every true caption calls for.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.demo.check import SCENES, read_scenes
from conf import UserError, run_cli

REPOSITORY = Path(__file__).resolve().parents[2]
WITHOUT_TRAINING_PACKAGES = REPOSITORY / "tests" / "inference" / "without_training_packages.py"


def use_package(package: Path, arguments: list[str], stdout: Path | None = None) -> None:
    """`python -m emu_inference ARGUMENTS` in the exported folder; its output goes to a file, if one is given."""
    command = [sys.executable, str(WITHOUT_TRAINING_PACKAGES), "emu_inference", *arguments]
    print(f"python -m emu_inference {' '.join(arguments[:3])} ...", flush=True)
    if stdout is None:
        code = subprocess.run(command, cwd=package).returncode
    else:
        with stdout.open("wb") as file:
            code = subprocess.run(command, cwd=package, stdout=file).returncode
    if code:
        raise UserError(f"the exported package failed with code {code}: read its message above, and export again")


def predict(out: Path) -> None:
    """Write captions.jsonl, images.safetensors and texts.safetensors, in the order of `SCENES` and their lines."""
    package, predictions = out / "run" / "export", (out / "predictions").resolve()
    predictions.mkdir(exist_ok=True)
    scenes = [(out / "corpora" / name, scene) for name in SCENES for scene in read_scenes(out, name)]
    images = [str((folder / scene["file"]).resolve()) for folder, scene in scenes]
    captions = [scene["caption"] for _, scene in scenes]
    use_package(package, ["caption", "--json", *images], stdout=predictions / "captions.jsonl")
    use_package(package, ["embed", "--out", str(predictions / "images.safetensors"), "--image", *images])
    use_package(package, ["embed", "--out", str(predictions / "texts.safetensors"), "--text", *captions])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.predict", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder of the demo (%(default)s)")
    out = parser.parse_args().out
    predict(out)
    print(f"answers in {out / 'predictions'}; next: python -m benchmarks.demo.check --out {out}")


if __name__ == "__main__":
    run_cli(main)
