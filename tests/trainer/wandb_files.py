"""What is in the files of an offline wandb run: LevelDB's log format, with a header of seven bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    content, at, parts = path.read_bytes(), FILE_HEADER, b""
    assert content.startswith(b":W&B")
    while at + RECORD_HEADER <= len(content):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # too little room for a record: padding
            at += BLOCK - at % BLOCK
            continue
        _crc, length, kind = struct.unpack("<IHB", content[at : at + RECORD_HEADER])
        piece = content[at + RECORD_HEADER : at + RECORD_HEADER + length]
        at += RECORD_HEADER + length
        if kind == 0:
            continue
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
