"""Damaged tars, made from whole ones: each mutation is a pure function (bytes, rng) -> bytes."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

BLOCK = tarfile.BLOCKSIZE
Rng = np.random.Generator
HOSTILE_SIZES = (0, 1, 511, 513, 1 << 20, 1 << 31, (1 << 33) - 1, 1 << 40, 1 << 62, -1, -512)
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, "", " ", "\ud800", "x" * 3000,
    [], {}, [[]], [None], {"a": []},
)  # fmt: skip


class Member(NamedTuple):
    """A member of a whole tar: [start, end) with headers and padding, [data, data + size) its content."""

    start: int
    data: int
    size: int
    end: int
    name: str


def members_of(tar: bytes) -> list[Member]:
    """Of a tar that may be damaged: tarfile goes round in circles where a size is negative."""
    found: list[Member] = []
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        while (i := archive.next()) is not None:
            end = i.offset_data + -(-i.size // BLOCK) * BLOCK
            if not (found[-1].end if found else 0) <= i.offset < i.offset_data <= end <= len(tar):
                break
            found.append(Member(i.offset, i.offset_data, i.size, end, i.name))
    return found


def some_samples(tar: bytes, ranges: list[tuple[int, int]], rng: Rng) -> bytes:
    """A whole tar of one to five neighbouring samples of a large one."""
    count = int(rng.integers(1, 6))
    first = int(rng.integers(0, max(1, len(ranges) - count)))
    chosen = ranges[first : first + count]
    return tar[chosen[0][0] : chosen[-1][1]] + bytes(2 * BLOCK)


def make_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header block whose checksum is right whatever the size claims."""
    info = tarfile.TarInfo(name[:90])
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:BLOCK])
    octal = 0 <= size < 8**11
    block[124:136] = (
        b"%011o\0" % size if octal else (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    )
    return with_checksum(block)


def with_checksum(block: bytes | bytearray) -> bytes:
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) & 0o777777)
    return bytes(block)


def pick(items: list[Member], rng: Rng) -> Member:
    return items[int(rng.integers(len(items)))]


def flip_bytes(tar: bytes, rng: Rng) -> bytes:
    return flipped(tar, 0, len(tar), rng)


def flipped(data: bytes, begin: int, end: int, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(2 ** rng.integers(0, 7))):
        if end > begin:
            changed[int(rng.integers(begin, end))] = int(rng.integers(256))
    return bytes(changed)


def flip_header(tar: bytes, rng: Rng) -> bytes:
    """Bytes of a header, the checksum put right half of the time so that the damage is believed."""
    member = pick(members_of(tar), rng)
    begin = member.data - BLOCK
    changed = flipped(tar, begin, begin + BLOCK, rng)
    header = changed[begin : begin + BLOCK]
    return changed[:begin] + (with_checksum(header) if rng.random() < 0.5 else header) + changed[begin + BLOCK :]


def cut_off(tar: bytes, rng: Rng) -> bytes:
    end = int(rng.integers(0, len(tar)))
    return tar[: end - end % BLOCK if rng.random() < 0.5 else end]


def change_size(tar: bytes, rng: Rng) -> bytes:
    member = pick(members_of(tar), rng)
    near = [member.size - 1, member.size + 1, member.size * 2, member.size + BLOCK]
    size = int(rng.choice(np.array([*HOSTILE_SIZES, *near], dtype=object)))
    begin = member.data - BLOCK
    return tar[:begin] + make_header(member.name, size) + tar[member.data :]


def change_kind(tar: bytes, rng: Rng) -> bytes:
    """A link, folder, device, sparse file, long name or pax header where a file was."""
    member = pick(members_of(tar), rng)
    kind = b"0123456 7gxLKSVMNAX\0"[int(rng.integers(19)) :][:1]
    size = member.size if rng.random() < 0.6 else int(rng.choice(np.array(HOSTILE_SIZES, dtype=object)))
    return tar[: member.data - BLOCK] + make_header(member.name, size, kind) + tar[member.data :]


def splice_header(tar: bytes, rng: Rng) -> bytes:
    """The header of one member in front of, or instead of, anything block-aligned."""
    member = pick(members_of(tar), rng)
    place = int(rng.integers(0, len(tar) // BLOCK + 1)) * BLOCK
    header = tar[member.data - BLOCK : member.data]
    return tar[:place] + header + tar[place + (BLOCK if rng.random() < 0.5 else 0) :]


def splice_pax(tar: bytes, rng: Rng) -> bytes:
    """A pax header with records that lie about the member behind it."""
    member = pick(members_of(tar), rng)
    record = [
        b"size=99999999999\n", b"size=-5\n", b"size=x\n", b"path=../../etc/x.jpg\n", b"path=\xff\xfe\n", b"path=\n",
        b"GNU.sparse.major=1\n", b"GNU.sparse.size=1099511627776\n", b"GNU.sparse.map=0,1\n",
        b"hdrcharset=BINARY\n", b"\0\n",
    ][int(rng.integers(11))]  # fmt: skip
    length = len(record) + 3 if rng.random() < 0.8 else int(rng.integers(0, 100))
    body = b"%02d " % (length % 100) + record
    padded = body + bytes(-len(body) % BLOCK)
    return tar[: member.start] + make_header("pax", len(body), tarfile.XHDTYPE) + padded + tar[member.start :]


def duplicate_member(tar: bytes, rng: Rng) -> bytes:
    members = members_of(tar)
    member, place = pick(members, rng), pick(members, rng)
    return tar[: place.end] + tar[member.start : member.end] + tar[place.end :]


def remove_member(tar: bytes, rng: Rng) -> bytes:
    member = pick(members_of(tar), rng)
    return tar[: member.start] + tar[member.end :]


def insert_zeros(tar: bytes, rng: Rng) -> bytes:
    """What reads as an early end of the archive."""
    place = pick(members_of(tar), rng).start if rng.random() < 0.7 else int(rng.integers(0, len(tar)))
    return tar[:place] + bytes(BLOCK * int(rng.integers(1, 4))) + tar[place:]


def insert_noise(tar: bytes, rng: Rng) -> bytes:
    place = pick(members_of(tar), rng).start
    return tar[:place] + rng.bytes(int(rng.integers(1, 3 * BLOCK))) + tar[place:]


def with_content(tar: bytes, member: Member, content: bytes) -> bytes:
    padded = content + bytes(-len(content) % BLOCK)
    return tar[: member.start] + make_header(member.name, len(content)) + padded + tar[member.end :]


def change_content(tar: bytes, rng: Rng) -> bytes:
    """One member with an intact header and damaged content: flipped, cut, emptied, repeated, or another member's."""
    members = members_of(tar)
    member = pick(members, rng)
    content = tar[member.data : member.data + member.size]
    head = min(len(content), int(4 ** rng.integers(2, 9)))
    other = pick(members, rng)
    choices: list[Callable[[], bytes]] = [
        lambda: flipped(content, 0, len(content), rng),
        lambda: flipped(content, 0, head, rng),
        lambda: flipped(content, max(0, len(content) - head), len(content), rng),
        lambda: content[: int(rng.integers(0, len(content) + 1))],
        lambda: content + content,
        lambda: content[: len(content) // 2] + rng.bytes(64) + content[len(content) // 2 :],
        lambda: tar[other.data : other.data + other.size],
    ]
    return with_content(tar, member, choices[int(rng.integers(len(choices)))]())


def change_pictures_header(tar: bytes, rng: Rng) -> bytes:
    """16- and 32-bit fields of a jpeg, png or mp4 set to extremes: sizes, counts, offsets, tables."""
    member = pick(members_of(tar), rng)
    content = bytearray(tar[member.data : member.data + member.size])
    for _ in range(int(rng.integers(1, 4))):
        width = int(rng.choice([2, 4, 8]))
        if len(content) > width:
            at = (
                int(rng.integers(0, min(len(content), 2048) - width))
                if rng.random() < 0.7
                else int(rng.integers(0, len(content) - width))
            )
            value = [0, 1, 1 << (8 * width - 1), (1 << 8 * width) - 1, 0x7FFF][int(rng.integers(5))]
            content[at : at + width] = value.to_bytes(width, "big")
    return with_content(tar, member, bytes(content))


def change_json(tar: bytes, rng: Rng) -> bytes:
    """A value somewhere in a json member replaced by one of another type; without a json member, `change_content`."""
    jsons = [member for member in members_of(tar) if member.name.endswith("json")]
    if not jsons:
        return change_content(tar, rng)
    member = pick(jsons, rng)
    try:
        parsed = json.loads(tar[member.data : member.data + member.size])
    except ValueError:
        return change_content(tar, rng)
    for _ in range(int(rng.integers(1, 4))):
        parsed = replaced(parsed, rng)
    return with_content(tar, member, json.dumps(parsed).encode())


def replaced(value: Any, rng: Rng) -> Any:
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key = list(value)[int(rng.integers(len(value)))] if isinstance(value, dict) else int(rng.integers(len(value)))
        value[key] = replaced(value[key], rng)
        return value
    return HOSTILE_VALUES[int(rng.integers(len(HOSTILE_VALUES)))]


MUTATIONS: tuple[Callable[[bytes, Rng], bytes], ...] = (
    flip_bytes, flip_header, cut_off, change_size, change_kind, splice_header, splice_pax, duplicate_member,
    remove_member, insert_zeros, insert_noise, change_content, change_content, change_pictures_header,
    change_pictures_header, change_json,
)  # fmt: skip


def mutate(tar: bytes, rng: Rng) -> tuple[bytes, str]:
    """The tar after one to three mutations, and their names."""
    names = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        mutation = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
        with contextlib.suppress(tarfile.TarError, IndexError, ValueError, OverflowError):  # too broken to be broken
            tar = mutation(tar, rng)
            names.append(mutation.__name__)
    return tar, "+".join(names)
