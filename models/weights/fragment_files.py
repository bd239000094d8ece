"""One rank's fragments on disk, and reading any fragment back out of the files of all ranks.

`fragments-00000.safetensors` holds 1-D fp32 tensors named `<parameter>|weight`, `<parameter>|exp_avg` and
`<parameter>|exp_avg_sq`; `fragments-00000.json` says which slice of which parameter each one is. Neither torch's pickle
nor DeepSpeed is needed to read them.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from conf import UserError
from models.weights.fragments import Fragment, copy_overlap, overlaps, whole
from models.weights.tensor_files import Digest, TensorToWrite, open_to_write, write_safetensors

WEIGHT = "weight"


@dataclass(frozen=True)
class FragmentValues:
    """tensors: 1-D values by kind (`weight`, `exp_avg`, `exp_avg_sq`), all as long as the fragment.

    num_updates: Adam's step count.
    """

    fragment: Fragment
    tensors: dict[str, Tensor]
    num_updates: int


def write_json(path: Path, content: Any) -> None:
    """Write and flush to the disk."""
    with open_to_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())


def write_fragments(
    folder: Path, rank: int, values: Sequence[FragmentValues], digest: Digest | None = None
) -> tuple[Path, Path]:
    """Write one rank's two files and flush them to the disk; the paths of the data and of the index.

    digest: fed with every byte of the data, so that they need not be read again.
    """
    entries = [
        asdict(value.fragment) | {"tensors": list(value.tensors), "num_updates": value.num_updates} for value in values
    ]
    tensors = [
        TensorToWrite(fragment_key(value.fragment.name, kind), tuple(tensor.shape), torch.float32, _in_fp32(tensor))
        for value in values
        for kind, tensor in value.tensors.items()
    ]
    data, index = folder / f"fragments-{rank:05d}.safetensors", folder / f"fragments-{rank:05d}.json"
    for _ in write_safetensors(data, tensors, {}, digest):
        pass
    write_json(index, {"fragments": entries})
    return data, index


def _in_fp32(tensor: Tensor) -> Callable[[], list[Tensor]]:
    """A bf16 (frozen) weight becomes fp32 when its turn comes."""
    return lambda: [tensor.detach().float().cpu()]


class FragmentReader:
    """All fragments of a checkpoint folder, of whatever layout. Only the ranges asked for are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, list[_Stored]] = defaultdict(list)
        self._files: dict[Path, Any] = {}
        for index in sorted(folder.glob("fragments-*.json")):
            for stored in _read_index(index):
                self._stored[stored.fragment.name].append(stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter, by name in order of names."""
        return {name: self._stored[name][0].fragment.shape for name in sorted(self._stored)}

    def has(self, name: str, kind: str) -> bool:
        return all(kind in stored.kinds for stored in self._stored[name])

    def num_updates(self, name: str) -> int:
        return max(stored.num_updates for stored in self._stored[name])

    def read(self, target: Fragment, kind: str) -> Tensor:
        """Values of `target` (fp32, 1-D, on the CPU), put together from whatever files hold parts of it."""
        values = torch.empty(target.length, dtype=torch.float32)
        num_copied = 0
        for stored in self._stored[target.name]:
            for overlap in overlaps(stored.fragment, target):
                first, last = overlap.source_range
                source = self._open(stored.data).get_slice(fragment_key(target.name, kind))[first:last]
                copy_overlap(source, values, overlap)
                num_copied += overlap.numel
        if num_copied != target.length:
            raise UserError(
                f"{self.folder} holds {num_copied} of {target.length} values of {target.name}: fragment files of some "
                "ranks are missing, so copy the folder again from where it was written"
            )
        return values

    def _open(self, data: Path) -> Any:
        if data not in self._files:
            self._files[data] = safe_open(data, framework="pt")
        return self._files[data]


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor of the global shape) of every parameter, one at a time: memory stays near the largest one."""
    reader = FragmentReader(folder)
    for name, shape in reader.shapes().items():
        yield name, reader.read(whole(name, shape), WEIGHT).view(shape)


@dataclass(frozen=True)
class _Stored:
    data: Path
    fragment: Fragment
    kinds: tuple[str, ...]
    num_updates: int


def fragment_key(name: str, kind: str) -> str:
    return f"{name}|{kind}"


def _read_index(index: Path) -> Iterator[_Stored]:
    try:
        for entry in json.loads(index.read_text(encoding="utf-8"))["fragments"]:
            kinds, num_updates = tuple(entry.pop("tensors")), int(entry.pop("num_updates"))
            fragment = Fragment(**entry | {"shape": tuple(entry["shape"])})
            yield _Stored(index.with_suffix(".safetensors"), fragment, kinds, num_updates)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{index} does not describe checkpoint fragments ({error!r}): take another checkpoint"
        ) from error
