"""Byte ranges over http(s). fsspec's own http hides the headers that tell whether the bytes are the right ones."""

from __future__ import annotations

import os
import re
import time
from functools import lru_cache

import requests
import urllib3

from data_pipelines.stores import Fetched, PermanentError, ShardStat, TransientError

PASSING_STATUS = (408, 425, 429)
NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)
UNUSABLE_URLS = (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema)
PIECE_BYTES = 1 << 18


def read_http(url: str, offset: int, nbytes: int, timeout_s: float) -> Fetched:
    """Bytes [offset, offset + nbytes) by one GET of at most `timeout_s`; fewer only where the shard ends.

    A HEAD is never sent: signed urls allow but one method. Raises TransientError or PermanentError.
    """
    headers = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
    deadline = time.monotonic() + timeout_s
    try:
        with _session(os.getpid()).get(url, headers=headers, timeout=timeout_s, stream=True) as response:
            return _read_answer(response, offset, nbytes, deadline)
    except UNUSABLE_URLS as error:
        raise PermanentError(str(error)) from error
    except NETWORK_ERRORS as error:
        raise TransientError(_in_short(error)) from error


@lru_cache(maxsize=1)
def _session(pid: int) -> requests.Session:
    """One a process: a connection must not be shared with the parent of a fork."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_connections=64, pool_maxsize=64))
    return session


def _read_answer(response: requests.Response, offset: int, nbytes: int, deadline: float) -> Fetched:
    status = response.status_code
    if status in PASSING_STATUS or status >= 500:
        raise TransientError(f"{status} {response.reason}")
    if status not in (206, 416):
        reason = "the server does not serve byte ranges" if status == 200 else f"{status} {response.reason}"
        raise PermanentError(reason)
    told = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", told)
    if match is None:
        raise TransientError(f"the answer has the Content-Range {told!r}")
    first, last, size = match.groups()
    version = ShardStat(int(size), 0, _etag(response))
    if status == 416:
        return Fetched(b"", version)
    expected = min(nbytes, version.size - offset)
    if (int(first or 0), int(last or 0)) != (offset, offset + expected - 1):
        raise TransientError(f"bytes {first}-{last} came where {offset}-{offset + expected - 1} were asked for")
    return Fetched(_read_body(response, expected, deadline), version)


def _read_body(response: requests.Response, nbytes: int, deadline: float) -> bytes:
    """Exactly `nbytes`: a body of any other length is no answer to what was asked."""
    if int(response.headers.get("Content-Length", nbytes)) != nbytes:
        raise TransientError(f"a body of {response.headers['Content-Length']} bytes came where {nbytes} were due")
    body = bytearray()
    while len(body) <= nbytes:
        piece = response.raw.read(min(PIECE_BYTES, nbytes + 1 - len(body)))
        if not piece:
            break
        body += piece
        if time.monotonic() > deadline:
            raise TransientError(f"only {len(body)} of {nbytes} bytes came in time")
    if len(body) != nbytes:
        raise TransientError(f"a body of {len(body)} bytes came where {nbytes} were due")
    return bytes(body)


def _etag(response: requests.Response) -> str:
    """A weak etag says nothing about bytes; the time of the last change then tells versions apart."""
    etag = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified", "") if etag.startswith("W/") or not etag else etag


def _in_short(error: Exception) -> str:
    """Innermost reason: urllib3 and requests wrap what the system said several times over."""
    while error.args and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    reason = getattr(error, "reason", None)
    if isinstance(reason, Exception):
        return _in_short(reason)
    return str(error).rpartition(": ")[2] or type(error).__name__
