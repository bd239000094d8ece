"""Command line of an exported model: `python -m emu_inference caption | answer | embed`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from emu_inference.config import UserError
from emu_inference.images import read_image
from emu_inference.modeling_emu import EMU_RELEASE, GREEDY, EmuModel
from emu_inference.processing_emu import EmuProcessor, Prompt

DECODING = {"greedy": GREEDY, "emu": EMU_RELEASE}
EXAMPLES = """examples:
  python -m emu_inference caption photos/*.jpg
  python -m emu_inference caption photo.jpg --prompt "a photo of"
  python -m emu_inference answer photo.jpg "what colour is the car?"
  python -m emu_inference embed --text "a red circle" --out text.safetensors
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        return 130
    return 0


def caption(options: argparse.Namespace) -> None:
    """Print what follows each image."""
    prefix = [options.prompt] if options.prompt else []
    texts = _generate(options, options.images, lambda path: [read_image(path), *prefix])
    for path, text in zip(options.images, texts, strict=True):
        tqdm.write(json.dumps({"image": path, "text": text}) if options.json else f"{path}: {text}")


def answer(options: argparse.Namespace) -> None:
    """Print what follows the image and the question."""
    (text,) = _generate(options, [options.image], lambda path: [read_image(path), options.question])
    line = {"image": options.image, "question": options.question, "text": text}
    print(json.dumps(line) if options.json else text)


def embed(options: argparse.Namespace) -> None:
    """Write visual embeddings [number of inputs, N, W]: the encoder's of images, or the regressed ones of texts."""
    out = Path(options.out)
    if not out.parent.is_dir():
        raise UserError(f"the folder of --out {out} does not exist: make it first")
    kind, encode = ("image", _encode_images) if options.image else ("text", _regress_images)
    inputs = options.image or options.text
    model, processor = _load(options)
    batches = _batches(inputs, options.batch_size, kind)
    with torch.inference_mode():
        embeddings = torch.cat([encode(model, processor, batch).float().cpu() for batch in batches])
    save_file({"embeddings": embeddings}, out, metadata={"kind": kind, "inputs": json.dumps(inputs)})
    shape = list(embeddings.shape)
    ending = f"wrote the embeddings {shape} of {len(inputs)} {kind}(s), in the order given, to {out}; "
    ending += f"next: safetensors.torch.load_file({str(out)!r})"
    print(json.dumps({"out": str(out), "kind": kind, "shape": shape}) if options.json else ending)


def _encode_images(model: EmuModel, processor: EmuProcessor, paths: Sequence[str]) -> Tensor:
    return model.encode_images(processor.pixels([read_image(path) for path in paths]))


def _regress_images(model: EmuModel, processor: EmuProcessor, texts: Sequence[str]) -> Tensor:
    return model.regress_image(processor([[text] for text in texts]))


def _generate(options: argparse.Namespace, paths: Sequence[str], make_prompt: Callable[[str], Prompt]) -> Iterator[str]:
    """The text that follows the prompt of each path, a batch at a time."""
    model, processor = _load(options)
    names = ("num_beams", "max_new_tokens", "length_penalty")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    decoding = replace(DECODING[options.decoding], **given)
    for batch in _batches(paths, options.batch_size, "image"):
        prompts = [make_prompt(path) for path in batch]
        yield from processor.decode(model.generate(processor(prompts), decoding))


def _load(options: argparse.Namespace) -> tuple[EmuModel, EmuProcessor]:
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {options.device} cannot be used here: give cpu, or a device that torch sees"
        ) from error
    processor = EmuProcessor.from_pretrained(options.model)
    return EmuModel.from_pretrained(options.model, device=options.device), processor


def _batches(items: Sequence[str], size: int, unit: str) -> Iterator[Sequence[str]]:
    # disable=None: a bar on a terminal only.
    with tqdm(total=len(items), unit=unit, disable=True if len(items) <= size else None) as bar:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            bar.update(len(batch))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m emu_inference",
        description="Emu reads and writes text and images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _add(commands, "caption", caption, "say what is in images")
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument(
        "--prompt", default="", metavar="TEXT", help="words that the caption begins with (they are not printed)"
    )
    _add_generation_options(command)

    command = _add(commands, "answer", answer, "answer a question about an image: what follows the question is printed")
    command.add_argument("image", metavar="IMAGE")
    command.add_argument("question", metavar="QUESTION")
    _add_generation_options(command)

    command = _add(commands, "embed", embed, "write visual embeddings to a safetensors file")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--image", nargs="+", metavar="FILE", help="embeddings of these images, by the encoder")
    source.add_argument("--text", nargs="+", metavar="TEXT", help="embeddings of the image that each text calls for")
    command.add_argument("--out", required=True, metavar="FILE", help="gets one tensor, embeddings [inputs, N, W]")
    return parser


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument(
        "--model",
        default=Path(__file__).resolve().parents[1],
        metavar="DIR",
        help="exported folder (default: the one that holds this package, %(default)s)",
    )
    command.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (%(default)s)"
    )
    command.add_argument("--batch-size", type=_at_least_1, default=16, metavar="N", help="inputs at once (%(default)s)")
    command.add_argument("--json", action="store_true", help="print one JSON object a line")
    return command


def _add_generation_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--decoding",
        choices=DECODING,
        default="greedy",
        help="greedy: fast, enough for small models; emu: the released defaults, 5 beams (%(default)s)",
    )
    command.add_argument("--num-beams", type=_at_least_1, metavar="N", help="instead of what --decoding says")
    command.add_argument("--max-new-tokens", type=_at_least_1, metavar="N", help="likewise")
    command.add_argument("--length-penalty", type=float, metavar="P", help="likewise; above 0 favours longer texts")


def _at_least_1(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
