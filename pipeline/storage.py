"""The only door to local disks and object storage: URIs, ranged reads, retries, atomic writes, redaction.

Local paths never pass through fsspec. Remote file systems are asked for anew at every call, never kept: fsspec drops
its instances after a fork, so nothing here holds a connection that a child process would share.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from pipeline.errors import ConfigError, DataError
from pipeline.local_files import FileInfo, commit_file, list_local, put_local_if_absent, write_local
from pipeline.retry import explain, is_transient, with_retries
from pipeline.s3_reads import read_s3
from pipeline.uri import SCHEME, join, name_of, redact, split_scheme

__all__ = [
    "FileInfo",
    "delete",
    "exists",
    "is_local",
    "join",
    "list_files",
    "local_path",
    "name_of",
    "open_read",
    "put_file",
    "put_if_absent",
    "read_bytes",
    "read_twice",
    "read_view",
    "reader_below",
    "redact",
    "size_of",
    "write_atomic",
]
T = TypeVar("T")

_EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "az": ("adlfs", "azure"), "https": ("aiohttp", "s3")}
_READ_BLOCK_BYTES = 8 * 2**20
_AGREEMENT_TRIES = 4


def is_local(uri: str) -> bool:
    """Return whether the URI is a path of this machine's file system."""
    return split_scheme(uri)[0] in ("", "file")


def local_path(uri: str) -> Path:
    """Return the URI as a local path.

    Raises:
        ConfigError: It is not local.
    """
    scheme, path = split_scheme(uri)
    if scheme not in ("", "file"):
        raise ConfigError(f"storage: {redact(uri)!r} is not a local path, and one is needed here.")
    return Path(path).expanduser()


def _file_system(scheme: str, use: Literal["read", "any"] = "any") -> Any:
    """Return fsspec's file system for a scheme, configured from the environment alone.

    Args:
        scheme: Of the URI.
        use: `read` leaves retries to the caller, who counts them; uploads in parts are better retried part by part.
    """
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("s3", "gs", "az"):
        options["use_listings_cache"] = False  # another process may have written since
    if scheme == "s3":
        # fsspec keeps instances by their arguments: named here, another endpoint is another instance.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
            options["endpoint_url"] = endpoint
        # A hung socket must end inside the retry budget.
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60}
        if use == "read":
            options["config_kwargs"]["retries"] = {"total_max_attempts": 1}
    try:
        fs = fsspec.filesystem(scheme, **options)
        if scheme == "s3" and use == "read":
            fs.retries = 1
        return fs
    except ImportError as error:
        package, extra = _EXTRAS.get(scheme, (scheme, scheme))
        raise ConfigError(
            f"storage: {scheme}:// needs the package {package}, which is not installed. "
            f"Install it with: pip install -e '.[{extra}]' -c constraints.txt"
        ) from error


def _remote(action: str, uri: str, call: Callable[[Any], T]) -> T:
    """Run one call against a remote file system, retrying what may pass by itself."""
    scheme = split_scheme(uri)[0]
    if scheme == "https" and action not in ("read", "look up"):
        raise ConfigError(
            f"storage: cannot {action} {redact(uri)}: https:// is read only. Use s3://, gs://, az:// or a path."
        )
    return with_retries(action, uri, lambda: call(_file_system(scheme)))


def _local(action: str, uri: str, call: Callable[[Path], T]) -> T:
    try:
        return call(local_path(uri))
    except OSError as error:
        raise explain(action, uri, error) from error


def _remote_info(uri: str) -> dict[str, Any] | None:
    def info(fs: Any) -> dict[str, Any] | None:
        try:
            return dict(fs.info(uri))
        except FileNotFoundError as error:
            if is_transient(error):
                raise
            return None

    return _remote("look up", uri, info)


def exists(uri: str) -> bool:
    """Return whether a file or folder is there."""
    if is_local(uri):
        return _local("look up", uri, lambda path: path.exists())
    return _remote_info(uri) is not None


def is_folder(uri: str) -> bool:
    """Return whether a URI is a folder (in object storage: a prefix with something below it)."""
    if is_local(uri):
        return _local("look up", uri, lambda path: path.is_dir())
    info = _remote_info(uri)
    return info is not None and info.get("type") == "directory"


def size_of(uri: str) -> int:
    """Return a file's size in bytes.

    Raises:
        DataError: There is no such file.
    """
    if is_local(uri):
        return _local("look up", uri, lambda path: path.stat().st_size)
    info = _remote_info(uri)
    if info is None:
        raise explain("look up", uri, FileNotFoundError(uri))
    if info.get("size") is None:
        raise DataError(
            f"storage: {redact(uri)}: the server does not say how large the file is, so it cannot be read in parts."
        )
    return int(info["size"])


def list_files(uri: str, *, recursive: bool = False) -> Iterator[FileInfo]:
    """Yield the files of a folder, in no particular order.

    Local folders are streamed; links to files and folders are followed, a folder reached twice is listed once.

    Raises:
        DataError: There is no such folder.
    """
    if is_local(uri):
        yield from list_local(uri, local_path(uri), recursive=recursive)
        return
    found = _remote(
        "list",
        uri,
        lambda fs: fs.find(uri, detail=True) if recursive else {e["name"]: e for e in fs.ls(uri, detail=True)},
    )
    if not found and not exists(uri):
        raise explain("list", uri, FileNotFoundError(uri))
    scheme = split_scheme(uri)[0]
    base = SCHEME.sub("", uri).strip("/") + "/"
    for name, entry in found.items():
        path = str(name).lstrip("/")
        if entry.get("type") == "file" and path.startswith(base) and not path.endswith("/"):
            version = str(
                entry.get("ETag") or entry.get("etag") or entry.get("LastModified") or entry.get("created") or ""
            )
            yield FileInfo(path[len(base) :], f"{scheme}://{path}", int(entry["size"]), version)


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """Read a file, or `length` bytes of it from `start`.

    Raises:
        DataError: There is no such file, or it ends before the range does.
        InfrastructureError: The storage failed for longer than the retry budget.
    """
    data = read_view(uri, start, length)
    return data.obj if isinstance(data.obj, bytes) else bytes(data)


def read_view(
    uri: str, start: int = 0, length: int | None = None, *, on_retry: Callable[[], None] = lambda: None
) -> memoryview:
    """Read as `read_bytes` does, without a copy where the storage's client owns the memory.

    Args:
        uri: The file.
        start: First byte.
        length: Bytes; None reads to the end.
        on_retry: Told of each attempt that failed and is made again.
    """
    if length == 0:
        return memoryview(b"")
    if is_local(uri):
        data = memoryview(_local("read", uri, lambda path: _read_local(path, start, length)))
    else:
        data = with_retries("read", uri, lambda: _read_remote(uri, start, length), on_retry=on_retry)
    if length is not None and len(data) != length:
        raise DataError(
            f"storage: {redact(uri)}: wanted {length} bytes at offset {start}, got {len(data)}. "
            "The file is shorter than its index says, or the server ignores ranges: check it with pipeline.verify."
        )
    return data


def reader_below(uri: str) -> Callable[[str], bytes]:
    """Return a function that reads whole files below a folder; it takes a local folder's URI apart only once."""
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
        f"storage: {redact(uri)}: {_AGREEMENT_TRIES + 1} reads gave different bytes each time. It is being replaced "
        "now, or the network damages what it carries: try again, then check the network."
    )


def _read_remote(uri: str, start: int, length: int | None) -> memoryview:
    scheme = split_scheme(uri)[0]
    is_whole = start == 0 and length is None
    if scheme == "s3":
        data = read_s3(uri, None if is_whole else start, length)
        if isinstance(data, memoryview):
            return data
    fs = _file_system(scheme, "read")
    return memoryview(_cat(fs, uri, None if is_whole else start, None if length is None else start + length))


def _cat(fs: Any, uri: str, start: int | None, end: int | None) -> bytes:
    try:
        return bytes(fs.cat_file(uri, start=start, end=end))
    except OSError as error:
        # S3 answers 416 where a range starts behind the end; that is a short file, not a broken server.
        if start is not None and (
            "InvalidRange" in str(error) or "not satisfiable" in str(error) or error.errno == errno.EINVAL
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
        buffer_bytes: What is read ahead at a time from object storage. 1 MiB at most for local files.
    """
    if is_local(uri):
        return _local("read", uri, lambda path: path.open("rb", buffering=min(buffer_bytes, 2**20)))
    return io.BufferedReader(_RangeReader(uri), buffer_size=buffer_bytes)


def make_folder(uri: str) -> None:
    """Make a local folder and its parents; object storage has none to make."""
    if is_local(uri):
        _local("write", uri, lambda path: path.mkdir(parents=True, exist_ok=True))


def write_atomic(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Local: a temporary name in the same folder, fsync, rename. Object storage: one PUT.
    """
    if is_local(uri):
        _local("write", uri, lambda path: write_local(path, lambda file: file.write(data), commit_file))
        return
    _remote("write", uri, lambda fs: fs.pipe_file(uri, data))


def put_file(local: Path, uri: str) -> None:
    """Copy a local file to a URI, whole or not at all."""
    if is_local(uri):

        def copy(path: Path) -> None:
            with local.open("rb") as source:
                write_local(path, lambda file: shutil.copyfileobj(source, file, 2**20), commit_file)

        _local("write", uri, copy)
        return
    _remote("write", uri, lambda fs: fs.put_file(str(local), uri))


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write a file only where none is; return whether this call wrote it.

    The whole content appears at once: locally by a hard link (which fails where the name is taken), in object storage
    by a conditional PUT.
    """
    if is_local(uri):
        return _local("write", uri, lambda path: put_local_if_absent(path, data))
    attempts = 0

    def put(fs: Any) -> bool:
        nonlocal attempts
        attempts += 1
        try:
            fs.pipe_file(uri, data, mode="create")
        except FileExistsError:
            # A PUT that was answered too late has been retried: what is there may be ours.
            return attempts > 1 and bytes(fs.cat_file(uri)) == data
        except OSError as error:
            if "PreconditionFailed" in str(error) or "ConditionalRequestConflict" in str(error) or "412" in str(error):
                return attempts > 1 and bytes(fs.cat_file(uri)) == data
            raise
        return True

    return _remote("write", uri, put)


def delete(uri: str) -> None:
    """Remove a file; one that is not there is no error."""
    if is_local(uri):
        _local("delete", uri, lambda path: path.unlink(missing_ok=True))
        return

    def remove(fs: Any) -> None:
        with suppress(FileNotFoundError):
            fs.rm_file(uri)

    _remote("delete", uri, remove)
