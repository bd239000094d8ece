"""Files that strangers' records name: read only inside their folder, only regular ones, only up to a size."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from data_pipelines.sources.common import SampleError

SIGNATURES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


def is_plain_name(name: object) -> bool:
    """Whether a record's text can be the name of a file in a folder, and of nothing outside it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def read_file(folder: Path, *names: Any, noun: str, max_bytes: int) -> bytes:
    """The file folder/names[0]/...; raises `SampleError` "<noun> missing", "... too large" and the like.

    A link that leads out of the folder is refused.
    """
    if not all(map(is_plain_name, names)):
        raise SampleError(f"{noun} has an unsafe name")
    path = folder.joinpath(*names)
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise SampleError(f"{noun} lies outside its folder")
        with open(path, "rb", opener=_open_without_waiting) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SampleError(f"{noun} is no regular file")
            data = stream.read(max_bytes + 1) if status.st_size <= max_bytes else None
    except (FileNotFoundError, NotADirectoryError):
        raise SampleError(f"{noun} missing") from None
    except (OSError, RuntimeError, UnicodeError) as error:  # RuntimeError: links in a circle
        raise SampleError(f"{noun} cannot be read") from error
    if data is None or len(data) > max_bytes:
        raise SampleError(f"{noun} too large")
    return data


def picture_extension(encoded: bytes) -> str | None:
    """Extension by the first bytes, whatever the file was called; None for what is no picture."""
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "webp"
    return next((extension for start, extension in SIGNATURES.items() if encoded.startswith(start)), None)


def _open_without_waiting(path: str, flags: int) -> int:
    """A named pipe among the files would block for ever."""
    return os.open(path, flags | os.O_NONBLOCK)
