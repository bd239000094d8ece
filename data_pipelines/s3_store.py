"""Byte ranges of s3:// objects. s3fs reads them as well, but keeps to itself which version of the object it read."""

from __future__ import annotations

import asyncio
from typing import Any

import fsspec
from botocore.exceptions import NoCredentialsError, PartialCredentialsError
from fsspec.asyn import sync

from data_pipelines.stores import Fetched, PermanentError, ShardStat


def read_s3(url: str, offset: int, nbytes: int, timeout_s: float) -> Fetched:
    """Bytes [offset, offset + nbytes) by one request, fewer where the object ends; s3fs's errors."""
    fs, path = fsspec.core.url_to_fs(url)
    try:
        return sync(fs.loop, _within, timeout_s, fs, path, offset, nbytes)
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise PermanentError(str(error)) from error


async def _within(timeout_s: float, *arguments: Any) -> Fetched:
    return await asyncio.wait_for(_get(*arguments), timeout_s)


async def _get(fs: Any, path: str, offset: int, nbytes: int) -> Fetched:
    bucket, key, version = fs.split_path(path)
    wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={offset}-{offset + nbytes - 1}"}
    answer = await fs._call_s3("get_object", **wanted, **({"VersionId": version} if version else {}))
    async with answer["Body"] as body:
        data = await body.read()
    size = int(answer["ContentRange"].rpartition("/")[2])
    if len(data) != min(nbytes, size - offset):
        raise OSError(f"a body of {len(data)} bytes came where {nbytes} were due")
    return Fetched(data, ShardStat(size, 0, answer.get("ETag", "")))
