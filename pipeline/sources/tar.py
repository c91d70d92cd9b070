"""Tars of images as they are distributed: one tar, or ImageNet's tar of a tar a class; nothing is
unpacked.

One pass over the headers finds where each image lies in the outermost file; from then on an image
is one ranged read, so that any slice of the list can be read in any order, by anybody, from a disk
or from object storage. Names are those of the unpacked folders: what comes out is byte for byte
what the folders give.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats.tar import TarMember, TarScanner
from pipeline.sources.listing import (
    IMAGE_SUFFIXES,
    Listing,
    ListingBuilder,
    SourceSettings,
    Wanted,
    name_and_class,
    read_each,
)

_HEADER_BUFFER_BYTES = 4096
_SCAN_BUFFER_BYTES = 8 * 2**20
_SCANNERS = 16
_FILE_SHIFT = 44
"""A place is the file's number << 44 | offset: half a million files of up to 16 TiB."""


class _Window:
    """A part of a file as a stream that can skip."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._at, self._end = file, start, start + size
        file.seek(start)

    def read(self, size: int = -1, /) -> bytes:
        left = self._end - self._at
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def skip(self, size: int, /) -> int:
        skipped = min(size, self._end - self._at)
        self._at += skipped
        self._file.seek(self._at)
        return skipped


class TarSource:
    """A tar of images, a tar of class tars, or a folder of class tars.

    Args:
        uri: The tar, or the folder.
        settings: Where labels come from.
    """

    def __init__(self, uri: str, settings: SourceSettings | None = None) -> None:
        self.uri = uri
        self._settings = settings or SourceSettings()

    def read_all(self, wanted: Wanted) -> Iterator[bytes | str]:
        """Yield the members' bytes."""

        def read(i: int) -> bytes:
            file, offset = (
                wanted.places[i] >> _FILE_SHIFT,
                wanted.places[i] & (1 << _FILE_SHIFT) - 1,
            )
            return storage.read_bytes(wanted.files[file], offset, wanted.sizes[i])

        return read_each(self.uri, read, len(wanted))

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the member's name, as it would be unpacked, and its class where it has one."""
        return name_and_class(name, class_name)

    def listing(self) -> Listing:
        """Return the images by name, as unpacking would make them.

        Raises:
            DataError: A tar is cut or damaged, or there is no image in it.
        """
        files, tars, loose = self._find()
        found = ListingBuilder()
        names = [member.name for _, member in loose]
        common = _common_folder(names) if not tars else ""
        for (file, member), name in zip(loose, names, strict=True):
            found.add(
                name.removeprefix(common), member.size, place=file << _FILE_SHIFT | member.offset
            )
        local = storage.is_local(self.uri)
        with ThreadPoolExecutor(1 if local else _SCANNERS, thread_name_prefix="tar") as pool:
            for (file, _, start, _), members in zip(
                tars, pool.map(lambda tar: _members(files, *tar), tars), strict=True
            ):
                for name, member in members:
                    found.add(name, member.size, place=file << _FILE_SHIFT | start + member.offset)
        if not len(found):
            raise DataError(
                f"convert: no image in {storage.redact(self.uri)}; seen: {found.seen()}. Looked "
                "for "
                f"{', '.join(IMAGE_SUFFIXES)}, and for tars of them."
            )
        return found.build(self.uri, self._settings, kind="tar", files=files)

    def _find(
        self,
    ) -> tuple[tuple[str, ...], list[tuple[int, str, int, int]], list[tuple[int, TarMember]]]:
        """Return the files, the tars in them as (file, class, start, size), and the members outside
        of those."""
        if not self.uri.startswith("https:") and storage.is_folder(self.uri):
            inside = sorted(
                (f for f in storage.list_files(self.uri) if f.name.endswith(".tar")),
                key=lambda f: f.name,
            )
            tars = [
                (n, PurePosixPath(file.name).stem, 0, file.size_bytes)
                for n, file in enumerate(inside)
            ]
            return tuple(file.uri for file in inside), tars, []
        nested: list[tuple[int, str, int, int]] = []
        loose: list[tuple[int, TarMember]] = []
        size = storage.size_of(self.uri)
        buffer_bytes = _HEADER_BUFFER_BYTES
        if not storage.is_local(self.uri) and not self._is_nested(size):
            buffer_bytes = (
                _SCAN_BUFFER_BYTES  # small members: reading on is cheaper than a request a header
            )
        with storage.open_read(self.uri, buffer_bytes=buffer_bytes) as file:
            for member in TarScanner(_Window(file, 0, size), shard=storage.redact(self.uri)):
                path = PurePosixPath(member.name)
                if path.suffix.lower() == ".tar":
                    nested.append((0, path.stem, member.offset, member.size))
                else:
                    loose.append((0, _clean(member)))
        return (self.uri,), nested, loose

    def _is_nested(self, size: int) -> bool:
        with storage.open_read(self.uri, buffer_bytes=_HEADER_BUFFER_BYTES) as file:
            first = next(
                iter(TarScanner(_Window(file, 0, size), shard=storage.redact(self.uri))), None
            )
        return first is not None and first.name.lower().endswith(".tar")


def _members(
    files: tuple[str, ...], file: int, class_name: str, start: int, size: int
) -> list[tuple[str, TarMember]]:
    """Return the members of one class tar, named as they would be unpacked into a folder of the
    tar's name."""
    buffer_bytes = _HEADER_BUFFER_BYTES if storage.is_local(files[file]) else _SCAN_BUFFER_BYTES
    where = f"{storage.redact(files[file])}: {class_name}.tar at byte {start}"
    with storage.open_read(files[file], buffer_bytes=buffer_bytes) as stream:
        scanner = TarScanner(_Window(stream, start, size), shard=where)
        return [(f"{class_name}/{_clean(member).name}", member) for member in scanner]


def _clean(member: TarMember) -> TarMember:
    name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
    return TarMember(name, member.header_offset, member.offset, member.size)


def _common_folder(names: list[str]) -> str:
    """Return the folder that all class folders lie in: `train/` of train/n01440764/x.JPEG."""
    images = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    common = ""
    while images:
        first = images[0][len(common) :].partition("/")[0]
        longer = f"{common}{first}/"
        if not all(name.startswith(longer) and "/" in name[len(longer) :] for name in images):
            break
        common = longer
    return common
