"""Sample captions of a run: RUN/samples/step-00001000/samples.json and the pictures beside it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import PIL.Image
from torch import Tensor

from data_pipelines.document import TokenizedDocument
from data_pipelines.lane import decode_images
from trainer.held_out import HeldOut

log = logging.getLogger(__name__)
NUM_KEPT = 20


class Sample(NamedTuple):
    """pixels: uint8 [3, H, W], what the model saw."""

    pixels: Tensor
    source: str
    truth: str
    generated: str


def show(documents: Sequence[TokenizedDocument], texts: dict[int, list[int]], held_out: HeldOut) -> list[Sample]:
    """The samples whose picture could be decoded. texts: ids by the number of the document."""
    settings = dataclasses.replace(held_out.settings, tp_rank=0, tp_size=1)
    images, _ = decode_images(documents, [len(documents)], settings)
    decode = held_out.settings.tokenizer.decode
    return [
        Sample(images[number], documents[number].key.source, held_out.truth(documents[number]), decode(ids))
        for number, ids in texts.items()
    ]


def write_samples(run_dir: Path, step: int, samples: Sequence[Sample]) -> Path | None:
    """The folder of a step, which bears its name only when it is whole; the oldest ones beyond NUM_KEPT go.

    None without samples, and where the disk refuses them: that must not end the run.
    """
    if not samples:
        return None
    folder = run_dir / "samples" / f"step-{step:08d}"
    try:
        _write_folder(folder, samples)
        for old in sorted(folder.parent.glob("step-*"))[:-NUM_KEPT]:
            shutil.rmtree(old)
    except OSError as error:
        log.warning("the samples of step %d could not be written (%s)", step, error)
        return None
    return folder


def _write_folder(folder: Path, samples: Sequence[Sample]) -> None:
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    lines = []
    for number, sample in enumerate(samples):
        PIL.Image.fromarray(sample.pixels.permute(1, 2, 0).contiguous().numpy()).save(unfinished / f"{number}.png")
        texts = {"source": sample.source, "truth": sample.truth, "generated": sample.generated}
        lines.append({"image": f"{number}.png", **texts})
    (unfinished / "samples.json").write_text(json.dumps(lines, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt before
    unfinished.rename(folder)
