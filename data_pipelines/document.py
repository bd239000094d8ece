"""What a sample becomes on its way from a shard to the model: Document -> TokenizedDocument -> PackedRow -> Batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np

if TYPE_CHECKING:  # launchers check sources on login nodes, without torch
    import torch


class SampleKey(NamedTuple):
    """Where a sample stands: source name, shard number in the index, sample number in the shard."""

    source: str
    shard: int
    index: int  # type: ignore[assignment] # hides tuple.index, which nobody calls on a key


@dataclass(frozen=True)
class RawSample:
    """One WebDataset sample as it lies in the tar.

    name: webdataset's ``__key__``; members: extension -> bytes;
    defect: why the sample cannot be used although it was read (e.g. a duplicate member), or None.
    """

    name: str
    members: dict[str, bytes]
    defect: str | None = None


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Image:
    """Encoded picture; ``box`` = (left, upper, right, lower) in pixels cuts one tile out of a storyboard sheet."""

    encoded: bytes
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Frame:
    """Frame ``slot`` of ``slots`` of an encoded video.

    position: None = the centre of segment ``slot`` (Emu's own rule), else a random place in [0, 1).
    """

    video: bytes
    slot: int
    slots: int
    position: float | None = None


Picture = Union[Image, Frame]
Element = Union[Text, Image, Frame]


@dataclass(frozen=True)
class Document:
    """Text and pictures in reading order. Everything after this point is blind to the source.

    max_tokens: cut the document to so many tokens, ``<s>`` and ``</s>`` included; None = only the row limits it.
    """

    elements: tuple[Element, ...]
    max_tokens: int | None = None


@dataclass(frozen=True)
class Skip:
    """A sample that gives no document, and why (a short fixed phrase: it is a key of the counters)."""

    reason: str


@dataclass(eq=False)
class TokenizedDocument:
    """Token ids of one document with ``<image>`` slots laid out, its pictures still encoded.

    input_ids: int32 [n], an array because a rank holds millions of them;
    image_starts: position of each ``[IMG]``; pictures[i] fills the slots after image_starts[i].
    pictures is None when the bytes were let go to stay inside ``data.buffer_mb``: read them again by ``key``.
    """

    key: SampleKey
    epoch: int
    input_ids: np.ndarray
    image_starts: list[int]
    pictures: list[Picture] | None
    num_truncated_tokens: int = 0


@dataclass(frozen=True)
class Cursor:
    """All the state of a lane: where to go on after a row.

    window: number of the window; row: rows of it already emitted;
    sources: per source (q, offset) when the window began (unit sequence number, samples of that unit already read);
    unreachable: (source number, q) of the units that this window passed over because their store did not answer;
    weights: of the sources in this window; () = those of the configuration, which may change between windows.
    """

    window: int
    row: int
    sources: tuple[tuple[int, int], ...]
    unreachable: tuple[tuple[int, int], ...] = ()
    weights: tuple[float, ...] = ()


@dataclass
class PackedRow:
    """One row of ``seq_len`` positions holding whole documents, pictures decoded.

    images: uint8 [m, 3, H, W], those of this rank; image_counts: m of every rank of the tensor-parallel group.
    failures: document -> why one of its pictures on this rank could not be decoded.
    skips: (source, reason) -> count of samples left out before packing, since the lane's previous row.
    unreachable: (source number, q) of the units that the lane passed over since its previous row.
    """

    lane: int
    cursor: Cursor
    documents: list[TokenizedDocument]
    images: torch.Tensor
    image_counts: list[int]
    failures: dict[int, str] = field(default_factory=dict)
    skips: dict[tuple[str, str], int] = field(default_factory=dict)
    unreachable: tuple[tuple[int, int], ...] = ()


@dataclass
class Batch:
    """One micro-batch of B rows of S positions with M images in all and at most D documents a row.

    input_ids int64 [B, S]; document_ids int32 [B, S], 1.. within a row, 0 = padding;
    position_ids int64 [B, S], restarting in every document;
    images uint8 [m, 3, H, W], those this rank is to encode, not normalised, channels-last in memory;
    image_counts: m of every rank of the tensor-parallel group, M together;
    image_starts int64 [M, 2]: row, column of each ``[IMG]``: the first rank's in reading order, then the second's ...;
    document_sources int64 [B, D]: source number (-1 = no document); document_ok bool [B, D].
    keys[b][d], names of the samples; cursors: lane -> cursor after its last row in this batch.
    failures: (row, document) -> why a picture could not be decoded; skips: of samples left out before packing.
    """

    input_ids: torch.Tensor
    document_ids: torch.Tensor
    position_ids: torch.Tensor
    images: torch.Tensor
    image_starts: torch.Tensor
    image_counts: list[int]
    document_sources: torch.Tensor
    document_ok: torch.Tensor
    keys: list[list[SampleKey]]
    cursors: dict[int, Cursor]
    failures: dict[tuple[int, int], str]
    skips: dict[tuple[str, str], int]

    def all_skips(self) -> Counter[tuple[str, str]]:
        """(source, reason) -> count of samples, left out before packing or broken."""
        broken = Counter((self.keys[r][d].source, reason) for (r, d), reason in self.failures.items())
        return Counter(self.skips) + broken
