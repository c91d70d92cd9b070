"""Local files: written so that a reader, or a run that was killed, never sees half of one; and
listed."""

from __future__ import annotations

import errno
import os
import stat as stat_module
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from pipeline.storage.hidden import is_hidden
from pipeline.storage.retry import explain
from pipeline.storage.uri import join

TMP_MARK = ".tmp-"
"""Part of the name of every unfinished file; such a file is never a dataset's and may be
removed."""


def tmp_path(path: Path) -> Path:
    """Return a fresh name beside a path, for a file that is not finished."""
    return path.with_name(f".{path.name}{TMP_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder last through a power cut."""
    with suppress(OSError):  # some network file systems refuse to open or sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def commit_file(tmp: Path, target: Path) -> None:
    """Put a finished temporary file in its place at once: flushed, renamed, and the rename
    flushed."""
    # Before the rename: after a power cut the name must not stand for an empty file.
    descriptor = os.open(tmp, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    tmp.replace(target)
    sync_folder(target.parent)


def write_local(
    path: Path, fill: Callable[[BinaryIO], object], place: Callable[[Path, Path], None]
) -> None:
    """Fill a temporary file beside a path, flush it to the disk, and put it in place; parents are
    made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = tmp_path(path)
    try:
        with tmp.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        place(tmp, path)
    finally:
        # Also after a rename, which has left no such file.
        with suppress(OSError):
            tmp.unlink()


def put_local_if_absent(path: Path, data: bytes) -> bool:
    """Write a file only if there is none, all of it at once; return whether this call wrote it."""

    def link(tmp: Path, target: Path) -> None:
        os.link(tmp, target)
        sync_folder(target.parent)

    try:
        write_local(path, lambda file: file.write(data), link)
    except FileExistsError:
        return False
    except OSError as error:
        # Everything but "no hard links here" is a failure.
        if error.errno not in (
            errno.EPERM,
            errno.EOPNOTSUPP,
            errno.ENOSYS,
            errno.EMLINK,
        ) or isinstance(error, FileNotFoundError):
            raise
        return _put_exclusively(path, data)  # a file system without hard links
    return True


def _put_exclusively(path: Path, data: bytes) -> bool:
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    with file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return True


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a listing.

    Args:
        name: Path below the listed folder, with forward slashes.
        uri: Where to open it.
        size_bytes: Its size.
        version: Modification time or entity tag: changes when the content is replaced. May be
            empty.
    """

    name: str
    uri: str
    size_bytes: int
    version: str = ""


class OtherEntry(StrEnum):
    """What a folder holds besides files."""

    FOLDER = "folder"
    SECOND_LINK = "link to a folder that is listed already"
    DEAD_LINK = "dead link"
    SOCKET = "socket"
    FIFO = "FIFO"
    DEVICE = "device"


OnOther = Callable[[str, OtherEntry], None]
"""Told of every entry that is not a file: its path below the listed folder, and what it is."""


def ignore_others(name: str, entry: OtherEntry) -> None:
    """Take no notice of an entry that is not a file."""


def list_local(
    uri: str, root: Path, *, recursive: bool, on_other: OnOther = ignore_others
) -> Iterator[FileInfo]:
    """Yield the files of a folder, streamed; links are followed, and a folder reached twice is
    listed once.

    Args:
        uri: The folder, as its files' URIs begin.
        root: The folder as a path.
        recursive: Go into folders below.
        on_other: Told of entries that are not files.
    """
    waiting: list[tuple[Path, str]] = [(root, "")]
    seen: set[tuple[int, int]] = set()
    while waiting:
        folder, prefix = waiting.pop()
        try:
            if prefix and not folder.exists():
                continue  # taken away while this goes on
            status = folder.stat()
            # By device and number: a link back to a folder above would be followed for ever.
            if (status.st_dev, status.st_ino) in seen:
                on_other(prefix.rstrip("/"), OtherEntry.SECOND_LINK)
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = os.scandir(folder)
        except OSError as error:
            # lost+found at the root of a disk is closed to all but root, and holds no data.
            if is_hidden(prefix) and isinstance(error, PermissionError):
                continue
            raise explain("list", str(folder), error) from error
        with entries:
            for entry in entries:
                name = prefix + entry.name
                kind = _kind_of(entry)
                if kind is OtherEntry.FOLDER and recursive:
                    waiting.append((Path(entry.path), name + "/"))
                if kind is not None:
                    on_other(name, kind)
                    continue
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue  # likewise
                yield FileInfo(
                    name, join(uri, name), stat.st_size, str(stat.st_mtime_ns)
                )


def _kind_of(entry: os.DirEntry[str]) -> OtherEntry | None:
    """Return what an entry is; None if it is a file."""
    try:
        if entry.is_dir():
            return OtherEntry.FOLDER
        if entry.is_file():
            return None
        mode = entry.stat().st_mode
    except OSError as error:
        # ELOOP: a link that leads to itself.
        if isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP:
            return OtherEntry.DEAD_LINK
        raise explain("look up", entry.path, error) from error
    if stat_module.S_ISSOCK(mode):
        return OtherEntry.SOCKET
    return OtherEntry.FIFO if stat_module.S_ISFIFO(mode) else OtherEntry.DEVICE
