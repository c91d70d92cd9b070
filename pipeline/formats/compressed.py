"""Recognises compressed files, by name and by their first bytes, and unpacks gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.errors import DataError

_CHUNK_BYTES = 2**20
"""Unpacked bytes held at a time: a file of a kilobyte may stand for a gigabyte of zeros."""


@dataclass(frozen=True)
class Compression:
    """A way to compress files.

    Args:
        name: For messages.
        magic: First bytes of every such file.
        endings: Of file names, in lower case; the first is the usual one.
        command: What unpacks a file; the file's name follows.
    """

    name: str
    magic: bytes
    endings: tuple[str, ...]
    command: str

    @property
    def ending(self) -> str:
        """The usual ending."""
        return self.endings[0]


GZIP = Compression("gzip", b"\x1f\x8b", (".tar.gz", ".tgz", ".taz"), "gunzip -k")
_ALL = (
    GZIP,
    Compression("bzip2", b"BZh", (".tar.bz2", ".tbz2", ".tbz", ".tb2"), "bunzip2 -k"),
    Compression("xz", b"\xfd7zXZ\0", (".tar.xz", ".txz"), "unxz -k"),
    Compression(
        "zstd", b"\x28\xb5\x2f\xfd", (".tar.zst", ".tzst", ".tar.zstd"), "unzstd"
    ),
    Compression("lz4", b"\x04\x22\x4d\x18", (".tar.lz4",), "unlz4"),
    Compression("compress", b"\x1f\x9d", (".tar.z",), "uncompress"),
    # Not for tars, but people have them in the place of one.
    Compression("zip", b"PK\x03\x04", (".zip",), "unzip"),
    Compression("7-Zip", b"7z\xbc\xaf\x27\x1c", (".7z",), "7z x"),
    Compression("RAR", b"Rar!\x1a\x07", (".rar",), "unrar x"),
)


UNPACKED_PREFIX = "maelstrom-unpacked-"
"""Start of the names of temporary folders that hold unpacked archives."""


def is_unpacked_copy(uri: str) -> bool:
    """Tell whether an address lies in a temporary folder of unpacked archives."""
    return f"/{UNPACKED_PREFIX}" in uri


def compression_of_name(name: str) -> Compression | None:
    """Return how a file is compressed, as its name says; None if it is not."""
    lower = name.lower()
    return next((kind for kind in _ALL if lower.endswith(kind.endings)), None)


def compression_of_bytes(start: bytes) -> Compression | None:
    """Return how a file is compressed, by its first bytes; None if it is not."""
    return next((kind for kind in _ALL if start.startswith(kind.magic)), None)


def unpack_gzip(
    uri: str, target: Path, *, on_read: Callable[[int], None] = lambda size: None
) -> None:
    """Unpack a gzip file to a local one, a piece at a time.

    Args:
        uri: The file.
        target: What is written.
        on_read: Told how many more bytes of the packed file were read.

    Raises:
        DataError: It is cut or damaged.
        OSError: The target cannot be written.
    """
    with storage.open_read(uri) as packed, target.open("wb") as file:
        unpacked = gzip.GzipFile(fileobj=packed, mode="rb")
        # Several members, one after the other as pigz and cat write them, are read as one.
        before = 0
        while data := _next_piece(unpacked, uri):
            file.write(data)
            at = packed.tell()
            on_read(at - before)
            before = at


def _next_piece(unpacked: gzip.GzipFile, uri: str) -> bytes:
    try:
        return unpacked.read(_CHUNK_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"convert: {storage.redact(uri)} is a gzip file that was cut or damaged ({error}). "
            "Copy it again from its source."
        ) from error
