"""Archives packed with gzip as a source: unpacked into a temporary folder while they are read.

A packed archive can only be read from its start, and every shard of a conversion reads its own
images: without this, each would unpack all images before them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from pipeline import storage
from pipeline.console import Progress, say
from pipeline.dataset.info import DATASET_FILE, PLAN_FILE
from pipeline.errors import ConfigError, InfrastructureError, MaelstromError
from pipeline.formats.compressed import (
    GZIP,
    UNPACKED_PREFIX,
    compression_of_bytes,
    compression_of_name,
    unpack_gzip,
)
from pipeline.images.header import IMAGE_SUFFIXES

_MAGIC_BYTES = 8
_OTHERS = (".beton", ".csv", ".tsv", ".jsonl", ".ndjson")
_STALE_AFTER_S = 600.0
"""Age at which a temporary folder that no process holds is taken for one of a killed process."""
_MOST_PREVIEWS = 3
"""Pictures beside archives that do not make them a folder of images."""


@contextmanager
def unpacked(uri: str) -> Iterator[str]:
    """Yield the address of a source without compression: its own, or that of a temporary copy.

    Args:
        uri: A file, a folder of archives, a pattern or a list.

    Raises:
        ConfigError: Packed in a way that is not read here.
        DataError: A packed archive is cut or damaged.
        InfrastructureError: The temporary folder is full.
    """
    archives = _archives(uri)
    packed = [file for file in archives if _is_gzip(file, among=len(archives))]
    if not packed:
        yield uri
        return
    is_folder = not uri.startswith("https:") and storage.is_folder(uri)
    with _temporary_folder() as temporary, _said_of_the_source(uri, temporary):
        folder = temporary / (storage.name_of(uri) if is_folder else "files")
        folder.mkdir()
        say(f"convert: unpacking {len(packed):,} gzip files into {folder} (TMPDIR)")
        label = f"Unpacking {storage.name_of(uri)}"
        total = sum(file.size_bytes for file in packed)
        with Progress(
            label,
            total=total,
            unit="bytes",
        ) as progress:
            for file in packed:
                _unpack(
                    file,
                    folder / _plain_name(file.name),
                    progress,
                )
        _add_others(
            uri,
            folder,
            archives,
            packed,
            is_folder=is_folder,
        )
        is_single = len(archives) == 1 and not is_folder
        yield str(folder / _plain_name(packed[0].name)) if is_single else str(folder)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a new folder that is locked while this process lives, and remove it at the end; remove
    those of processes that were killed."""
    _remove_stale(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=UNPACKED_PREFIX) as temporary:
        lock = os.open(temporary, os.O_RDONLY)
        try:
            # The system lets go of it when the process ends, however it ends.
            with suppress(OSError):  # a file system without locks: its folders stay
                fcntl.flock(lock, fcntl.LOCK_SH)
            yield Path(temporary)
        finally:
            os.close(lock)


def _remove_stale(folder: Path) -> None:
    """Remove temporary folders of unpacked archives whose process has died."""
    for path in folder.glob(f"{UNPACKED_PREFIX}*"):
        with suppress(OSError):
            # Not through a link, and nobody else's: the folder for temporary files is shared.
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(descriptor)
                # A process that has just made its folder may not hold the lock yet.
                is_new = time.time() - status.st_mtime < _STALE_AFTER_S
                if is_new or status.st_uid != os.geteuid():
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def _said_of_the_source(uri: str, temporary: Path) -> Iterator[None]:
    """Let errors name the source and not its temporary copy, which is gone when they are read."""
    try:
        yield
    except MaelstromError as error:
        text = str(error)
        if str(temporary) not in text:
            raise
        # A copy's whole path first: what is left of it after that are its folders.
        for folder in (
            temporary / storage.name_of(uri),
            temporary / "files",
            temporary,
        ):
            text = text.replace(str(folder), f"{storage.redact(uri)} (unpacked)")
        raise type(error)(text) from error


def is_packed(uri: str) -> bool:
    """Tell whether `unpacked` would make a copy."""
    archives = _archives(uri)
    return any(_is_gzip(file, among=len(archives)) for file in archives)


def _archives(uri: str) -> list[storage.FileInfo]:
    """Return the archives that an address stands for; empty if it stands for something else."""
    if uri.startswith("https:"):
        name = storage.name_of(uri)
        return (
            [
                storage.FileInfo(
                    name,
                    uri,
                    0,
                )
            ]
            if _refuse_unknown(name)
            else []
        )
    if storage.names_several(uri):
        return [file for file in storage.find_named(uri) if _refuse_unknown(file.name)]
    if not _may_be_archive(storage.name_of(uri)) or storage.is_folder(uri):
        return (
            _archives_in(uri) if storage.exists(uri) and storage.is_folder(uri) else []
        )
    is_there = storage.exists(uri) and _refuse_unknown(storage.name_of(uri))
    return [storage.find_one(uri)] if is_there else []


def _archives_in(uri: str) -> list[storage.FileInfo]:
    folders: list[str] = []

    def on_other(name: str, entry: storage.OtherEntry) -> None:
        if entry is storage.OtherEntry.FOLDER and not storage.is_hidden(name):
            folders.append(name)

    archives: list[storage.FileInfo] = []
    tables: list[str] = []
    num_pictures = 0
    has_others = False
    # Streamed: most folders are of images, and may hold ten million.
    for file in storage.list_files(uri, on_other=on_other):
        if file.name in (DATASET_FILE, PLAN_FILE):
            return []
        if storage.is_hidden(file.name):
            continue
        lower = file.name.lower()
        num_pictures += lower.endswith(IMAGE_SUFFIXES)
        has_others = has_others or lower.endswith(_OTHERS)
        if lower.endswith(".parquet"):
            tables.append(PurePosixPath(file.name).stem)
        if _may_be_archive(file.name):
            archives.append(file)

    # An archive beside images, tables or folders of images is somebody's backup: those are read,
    # and it is left out by name. A preview or two beside many archives is no collection.
    has_images = num_pictures > min(_MOST_PREVIEWS, len(archives) - 1)
    stems = {PurePosixPath(_plain_name(file.name)).stem for file in archives}
    # img2dataset writes 00000.parquet beside each archive.
    has_tables = not stems.issuperset(tables)
    if folders or has_images or has_others or has_tables:
        return []
    plain = [file for file in archives if compression_of_name(file.name) is None]
    if plain:
        return plain
    can_read = [
        file for file in archives if compression_of_name(file.name) in (None, GZIP)
    ]
    return can_read or [file for file in archives if _refuse_unknown(file.name)]


def _may_be_archive(name: str) -> bool:
    return name.lower().endswith(".tar") or compression_of_name(name) is not None


def _refuse_unknown(name: str) -> bool:
    """Tell whether a file is an archive; refuse one that is packed in another way than gzip."""
    kind = compression_of_name(name)
    if kind is not None and kind is not GZIP:
        raise ConfigError(
            f"convert: {name} is compressed with {kind.name}, which is not read here. Unpack it "
            f"first: {kind.command} {name}"
        )
    return _may_be_archive(name)


def _is_gzip(file: storage.FileInfo, *, among: int) -> bool:
    """Tell whether a file is packed with gzip; one that is called .tar is looked into.

    Args:
        file: The archive.
        among: How many archives there are: of many in a store, looking into each takes too long,
            and reading one that is packed will say so.
    """
    if compression_of_name(file.name) is GZIP:
        return True
    if not storage.is_local(file.uri) and among > 1:
        return False
    with storage.open_read(file.uri, buffer_bytes=512) as stream:
        kind = compression_of_bytes(stream.read(_MAGIC_BYTES))
    if kind is not None and kind is not GZIP:
        raise ConfigError(
            f"convert: {storage.redact(file.uri)} is compressed with {kind.name}, whatever its "
            f"name says, and is not read here. Unpack it first: {kind.command} FILE"
        )
    return kind is GZIP


def _plain_name(name: str) -> str:
    """Return an archive's name without its compression."""
    for ending in GZIP.endings:
        if name.lower().endswith(ending):
            return f"{name[: -len(ending)]}.tar"
    return name


def _unpack(
    file: storage.FileInfo,
    target: Path,
    progress: Progress,
) -> None:
    def advance(size: int) -> None:
        progress.advance(size, size_bytes=size)

    try:
        unpack_gzip(
            file.uri,
            target,
            on_read=advance,
        )
    except OSError as error:
        raise InfrastructureError(
            f"convert: {storage.redact(file.uri)} cannot be unpacked into {target.parent} "
            f"({error}). Free space there, or point TMPDIR to a larger disk."
        ) from error
    with target.open("rb") as stream:
        inner = compression_of_bytes(stream.read(_MAGIC_BYTES))
    if inner is not None:
        raise ConfigError(
            f"convert: {storage.redact(file.uri)} holds a file that is itself compressed with "
            f"{inner.name}. Unpack it once, for example with {GZIP.command}, and give that."
        )


def _add_others(
    uri: str,
    folder: Path,
    archives: list[storage.FileInfo],
    packed: list[storage.FileInfo],
    *,
    is_folder: bool,
) -> None:
    """Put beside the unpacked archives what lay beside the packed ones."""
    for file in archives:
        if file in packed:
            continue
        if not storage.is_local(file.uri):
            raise ConfigError(
                f"convert: {storage.redact(uri)} holds packed and plain archives. Give them apart, "
                "for example as 'FOLDER/*.tar.gz' and 'FOLDER/*.tar'."
            )
        (folder / file.name).symlink_to(storage.local_path(file.uri).resolve())
    if is_folder:
        names = {file.name for file in archives}
        for file in storage.list_files(uri):
            # Only their names are of use, for what is told at the end.
            if file.name not in names and PurePosixPath(file.name).name == file.name:
                (folder / file.name).touch()
