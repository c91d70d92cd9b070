"""Reads: whole files, ranges, streams."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import DataError
from pipeline.storage.door import file_system, is_local, local_path, on_disk, size_of
from pipeline.storage.retry import explain, with_retries
from pipeline.storage.s3 import read_s3
from pipeline.storage.uri import join, redact, split_scheme

_READ_BLOCK_BYTES = 8 * 2**20
_AGREEMENT_TRIES = 4


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """Read a file, or `length` bytes of it from `start`.

    Raises:
        DataError: There is no such file, or it ends before the range does.
        InfrastructureError: The storage failed for longer than the retry budget.
    """
    data = read_view(uri, start, length)
    return data.obj if isinstance(data.obj, bytes) else bytes(data)


def read_view(
    uri: str,
    start: int = 0,
    length: int | None = None,
    *,
    on_retry: Callable[[], None] = lambda: None,
) -> memoryview:
    """Read as `read_bytes` does, without a copy if the storage's client owns the memory.

    Args:
        uri: The file.
        start: First byte.
        length: Bytes; None reads to the end.
        on_retry: Told of each attempt that failed and is made again.
    """
    # Stores have no empty range: they answer it with the whole file or an error.
    if length == 0:
        return memoryview(b"")
    if is_local(uri):
        data = memoryview(
            on_disk("read", uri, lambda path: _read_local(path, start, length))
        )
    else:
        data = with_retries(
            "read", uri, lambda: _read_remote(uri, start, length), on_retry=on_retry
        )
    if length is not None and len(data) != length:
        raise DataError(
            f"storage: {redact(uri)}: wanted {length} bytes at offset {start}, got {len(data)}. "
            "The file is shorter than its index says, or the server ignores ranges: check it with "
            "pipeline.verify."
        )
    return data


def reader_below(uri: str) -> Callable[[str], bytes]:
    """Return a function that reads whole files below a folder; it takes a local folder's URI apart
    only once."""
    if not is_local(uri):
        return lambda name: read_bytes(join(uri, name))
    root = str(local_path(uri))

    def read(name: str) -> bytes:
        try:
            with open(f"{root}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - a Path costs as much as the read
                return file.read()
        except OSError as error:
            raise explain("read", join(uri, name), error) from error

    return read


def read_twice(uri: str) -> bytes:
    """Read a small file that nothing else vouches for: a remote one until two reads agree.

    Raises:
        DataError: There is no such file, or every read of it differs.
    """
    data = read_bytes(uri)
    if is_local(uri):
        return data
    for _ in range(_AGREEMENT_TRIES):
        before, data = data, read_bytes(uri)
        if before == data:
            return data
    raise DataError(
        f"storage: {redact(uri)}: {_AGREEMENT_TRIES + 1} reads gave different bytes each time. It "
        "is being replaced "
        "now, or the network damages what it carries: try again, then check the network."
    )


def _read_remote(uri: str, start: int, length: int | None) -> memoryview:
    scheme, uri = split_scheme(uri)
    is_whole = start == 0 and length is None
    if scheme == "s3":
        data = read_s3(uri, None if is_whole else start, length)
        if isinstance(data, memoryview):
            return data
    fs = file_system(scheme, "read")
    return memoryview(
        _cat(
            fs,
            uri,
            None if is_whole else start,
            None if length is None else start + length,
        )
    )


def _cat(fs: Any, uri: str, start: int | None, end: int | None) -> bytes:
    try:
        return bytes(fs.cat_file(uri, start=start, end=end))
    except OSError as error:
        # S3 answers 416 if a range starts behind the end; that is a short file, not a broken
        # server.
        if start is not None and (
            "InvalidRange" in str(error)
            or "not satisfiable" in str(error)
            or error.errno == errno.EINVAL
        ):
            return b""
        raise


def _read_local(path: Path, start: int, length: int | None) -> bytes:
    with path.open("rb", buffering=0) as file:
        if start:
            file.seek(start)
        if length is None:
            return file.read()
        parts = []
        left = length
        while left and (part := file.read(left)):  # one read() returns at most 2 GiB
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _RangeReader(io.RawIOBase):
    """A remote file read by ranges, so that every read has the retries of `read_bytes`."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._size = size_of(uri)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        # A range that starts at the end is an error in S3, and the end of a file here.
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        buffer[:length] = read_view(self._uri, self._at, length)
        self._at += length
        return length


def open_read(uri: str, *, buffer_bytes: int = _READ_BLOCK_BYTES) -> BinaryIO:
    """Open a file for reading; a context manager.

    Args:
        uri: The file.
        buffer_bytes: What is read ahead at a time from object storage. 1 MiB at most for local
            files.
    """
    if is_local(uri):
        return on_disk(
            "read",
            uri,
            lambda path: path.open("rb", buffering=min(buffer_bytes, 2**20)),
        )
    return io.BufferedReader(_RangeReader(uri), buffer_size=buffer_bytes)
