"""The members of a slice of a tar, fast: tarfile takes half as long for a small picture's headers as its decoding."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator

import numpy as np
from webdataset.tariterators import tar_file_iterator

BLOCK = 512
HEADER = struct.Struct("100s24x12s12x8ss100x8s80xs166x")
"""name, size, checksum, kind, magic and version, first byte of the prefix that very long names have."""
MAGICS = (b"ustar\x0000", b"ustar  \x00")
REGULAR, PAX = b"0", b"x"
META_NAME = re.compile(r"__[^/]*__($|/)")
TIME_RECORD = re.compile(rb"(\d+) mtime=\d+(\.\d+)?\n")


def read_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular members in order, without webdataset's ``__name__``.

    Raises what tarfile raises on damage.
    """
    try:
        members = _plain_members(data)
    except ValueError:
        members = [(member["fname"], member["data"]) for member in tar_file_iterator(io.BytesIO(data))]
    return (member for member in members if not META_NAME.match(member[0]))


def _plain_members(data: bytes) -> list[tuple[str, bytes]]:
    """Raises ValueError for all but regular files with short names: links, long names, damage, old formats."""
    members, begins, sums, begin = [], [], [], 0
    while len(data) - begin >= BLOCK:
        name, size, checksum, kind, magic, prefix = HEADER.unpack_from(data, begin)
        content_begin = begin + BLOCK
        content_end = content_begin + int(size.rstrip(b"\0"), 8)
        if magic not in MAGICS or prefix != b"\0" or name[0] == 0 or content_end > len(data):
            raise ValueError("not plain")
        if kind == REGULAR:
            path = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            members.append((path, data[content_begin:content_end]))
        elif kind != PAX or not _tells_time_only(data[content_begin:content_end]):
            raise ValueError("not plain")
        begins.append(begin)
        sums.append(int(checksum.partition(b"\0")[0], 8))
        begin = content_end + -content_end % BLOCK
    if not members or begin < len(data) or _sums(data, begins) != sums:
        raise ValueError("not plain")
    return members


def _tells_time_only(pax: bytes) -> bool:
    """webdataset's own writer puts the time of writing before every member. Anything else may be a name or a size."""
    record = TIME_RECORD.fullmatch(pax)
    return record is not None and int(record[1]) == len(pax)


def _sums(data: bytes, begins: list[int]) -> list[int]:
    """Checksums of the headers that begin there, their own fields taken as spaces."""
    blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    headers = blocks[np.array(begins) // BLOCK]
    headers[:, 148:156] = ord(" ")
    return headers.sum(axis=1, dtype=np.uint32).tolist()
