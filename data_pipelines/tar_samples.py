"""What lies in a tar: where its samples stand, and the samples of a slice of it.

Both follow webdataset: a sample is the regular members that lie together under one name up to the first dot of the
basename; names are keys, never paths.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from data_pipelines.document import RawSample
from data_pipelines.tar_members import META_NAME, read_members

MEMBER_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)$")
"""Key and extension: up to the first dot of the basename, as webdataset has it."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


@dataclass
class SampleRanges:
    """Where the whole samples of a tar stand: [start, end) in bytes; defects: what was left out, and why."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)


DAMAGE = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError)
"""What tarfile raises on headers that somebody made to hurt it, besides its own errors."""


def scan_samples(stream: BinaryIO, size: int) -> SampleRanges:
    """Where the samples of a tar of `size` bytes stand, read from its headers alone.

    A range begins at the first header block of its first member, GNU long names and pax headers included, and ends
    where its last member ends, padding included. What a damaged tar surely holds whole before the damage is kept.
    """
    found = SampleRanges()
    found.ranges.extend(sample_ranges(stream, size, found.defects))
    return found


def sample_ranges(stream: BinaryIO, size: int, defects: list[str]) -> Iterator[tuple[int, int]]:
    """The ranges of `scan_samples` one by one; what is left out is noted in `defects`."""
    try:
        tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - the caller closes the stream
    except DAMAGE as error:
        defects.append(_why_no_tar(stream, error))
        return
    yield from _group_members(_members(tar, stream, size, defects))


class _Member(NamedTuple):
    """start: first header block; end: where the next member begins; key: None = part of no sample; usable: readable."""

    start: int
    end: int
    key: str | None
    usable: bool


def _members(tar: tarfile.TarFile, stream: BinaryIO, size: int, defects: list[str]) -> Iterator[_Member]:
    """Members up to the end or the damage, each defect noted; damage counts as a part of the sample before it."""
    begin = 0
    while True:
        try:
            info = tar.next()
        except DAMAGE as error:
            defects.append(f"damaged at byte {begin} ({error}): the rest is left out")
            yield _Member(begin, begin, None, False)
            return
        if info is None:
            if _is_damaged_header(stream, begin):
                defects.append(f"damaged header at byte {begin}: the rest is left out")
                yield _Member(begin, begin, None, False)
            elif _has_data(stream, begin):
                defects.append(f"data behind the end of the archive at byte {begin}: they are left out")
            return
        tar.members = []  # type: ignore[attr-defined] # else the headers of a large shard pile up
        if not begin < tar.offset <= size:
            defects.append(f"cut inside the member at byte {info.offset}: the rest is left out")
            yield _Member(begin, begin, member_key(info), False)
            return
        if info.issparse():  # a few bytes may claim to be terabytes of zeros
            defects.append(f"sparse member at byte {info.offset}: its sample is left out")
        yield _Member(info.offset, tar.offset, member_key(info), not info.issparse())
        begin = tar.offset


def _is_damaged_header(stream: BinaryIO, offset: int) -> bool:
    """tarfile takes a damaged header for the end of the archive, but only zeros or nothing are an end."""
    stream.seek(offset)
    return any(stream.read(tarfile.BLOCKSIZE))


def _has_data(stream: BinaryIO, offset: int) -> bool:
    """Whether anything but zeros follows, such as an archive that was appended to another."""
    stream.seek(offset)
    return any(map(any, iter(lambda: stream.read(tarfile.RECORDSIZE), b"")))


def member_key(info: tarfile.TarInfo) -> str | None:
    """The sample that a member belongs to, by webdataset's rules; None for what webdataset passes over."""
    if not info.isreg() or META_NAME.match(info.name):
        return None
    parts = MEMBER_NAME.match(info.name)
    return parts[1] if parts else None


def _group_members(members: Iterator[_Member]) -> Iterator[tuple[int, int]]:
    """Members that are part of no sample (folders, links) fall to the sample before them, where they do no harm."""
    key: str | None = None
    start, end, usable = 0, 0, False
    for member in members:
        if member.key is None or member.key == key:
            usable, end = usable and member.usable, member.end
            continue
        if usable:
            yield start, end
        key, start, end, usable = member.key, member.start, member.end, member.usable
    if usable:
        yield start, end


def _why_no_tar(stream: BinaryIO, error: Exception) -> str:
    stream.seek(0)
    kind = COMPRESSED.get(stream.read(2))
    return f"{kind} data: decompress it, byte ranges need a plain tar" if kind else f"no tar: {error}"


def parse_samples(data: bytes, max_member_bytes: int) -> list[RawSample]:
    """Every sample of a slice of a tar, in order.

    Names are keys only, never paths; links, folders and the like are passed over. A sample with a member twice, or with
    one over the size limit, has a defect.
    """
    samples: list[RawSample] = []
    for path, content in read_members(data):
        parts = MEMBER_NAME.match(path)
        if parts is None:
            continue
        name, extension = parts.groups()
        if not samples or samples[-1].name != name:
            samples.append(RawSample(name, {}))
        samples[-1] = _with_member(samples[-1], extension.lower(), content, max_member_bytes)
    return samples


def _with_member(sample: RawSample, extension: str, data: bytes, max_member_bytes: int) -> RawSample:
    defect = sample.defect
    if extension in sample.members:
        defect = "duplicate member"
    elif len(data) > max_member_bytes:
        defect, data = "member too large", b""
    sample.members[extension] = data
    return sample if defect == sample.defect else RawSample(sample.name, sample.members, defect)
