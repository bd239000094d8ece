"""Tensors in files of any maker, read and written one at a time: memory stays near the largest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conf import UserError
from models.weights.direct_file import DirectFile

WRAPPERS = ("module", "state_dict", "model")
"""What a state dict may be wrapped in: DeepSpeed's, and those of common trainers."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its shape and dtype are known, its values are read by `load`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every floating-point tensor of a .safetensors or torch file, or of a folder of them as Hugging Face writes it.

    Nothing but tensors is unpickled. Raises UserError for what cannot be read, or is named by an index and missing.
    """
    files = _files_of(path) if path.is_dir() else [path]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            tensors.update(_open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file))
        except UNREADABLE as error:
            raise UserError(
                f"{file} cannot be read as a file of nothing but tensors ({type(error).__name__}): download it again, "
                "or save its state_dict as .safetensors"
            ) from error
    return tensors


def _files_of(folder: Path) -> list[Path]:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            try:
                weight_map = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
                named = sorted({str(file) for file in weight_map.values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{folder / name} is no index of weight files: download it again") from error
            # A stranger's index must not lead out of its folder.
            missing = [file for file in named if Path(file).name != file or not (folder / file).is_file()]
            if missing:
                raise UserError(f"{folder} lacks {missing[0]}, which its {name} names: download it again")
            return [folder / file for file in named]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors and no *.bin: name a folder with weights")
    return list(files)


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    opened = safe_open(file, framework="pt")
    found = {}
    for name in opened.keys():  # noqa: SIM118 - it is no dict
        part = opened.get_slice(name)
        if part.get_dtype() in DTYPES:
            load = _bind(opened.get_tensor, name)
            found[name] = StoredTensor(tuple(part.get_shape()), DTYPES[part.get_dtype()], load)
    return found


def _open_torch(file: Path) -> dict[str, StoredTensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch before 1.6 cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError("no state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return {
        name: StoredTensor(tuple(value.shape), value.dtype, _bind(tensors.__getitem__, name))
        for name, value in tensors.items()
        if value.is_floating_point()
    }


def _bind(load: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: load(name)


class Digest(Protocol):
    """A hash of hashlib or xxhash."""

    def update(self, content: bytes | memoryview, /) -> None: ...


@dataclass(frozen=True)
class TensorToWrite:
    """pieces: called when its turn comes; 1-D or more, of `dtype`, together the `shape`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]


@contextmanager
def open_to_write(file: Path) -> Iterator[BinaryIO]:
    """A file whose OSErrors name it."""
    with _errors_that_name(file), file.open("wb") as out:
        yield out


@contextmanager
def _errors_that_name(file: Path) -> Iterator[None]:
    """Those of a full disk do not, nor does what torch.save makes of them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, str(file)) from error


def write_safetensors(
    file: Path, tensors: Sequence[TensorToWrite], metadata: dict[str, str], digest: Digest | None = None
) -> Iterator[str]:
    """Write a .safetensors file, tensor after tensor, to the disk; yields the name of each that is written.

    The format: 8 bytes little-endian length of a JSON header, the header, the values. digest: fed with every byte.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        begin, end = end, end + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with _errors_that_name(file), DirectFile(file) as out:
        _write(out, len(encoded).to_bytes(8, "little") + encoded, digest)
        for tensor in tensors:
            _write_pieces(out, tensor, digest)
            yield tensor.name
        out.finish()


def _write_pieces(out: DirectFile, tensor: TensorToWrite, digest: Digest | None) -> None:
    expected = out.tell() + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
    for piece in tensor.pieces():
        assert piece.dtype == tensor.dtype
        _write(out, piece.detach().contiguous().view(-1).view(torch.uint8).numpy().data, digest)
    assert out.tell() == expected, f"the pieces of {tensor.name} are not of its shape"


def _write(out: DirectFile, content: bytes | memoryview, digest: Digest | None) -> None:
    out.write(content)
    if digest is not None:
        digest.update(content)
