"""Tars of images as they are distributed: one tar, or ImageNet's tar of a tar a class; nothing is
unpacked.

One pass over the headers finds the position of each image in the outermost file. From then on an
image is one ranged read: any slice of the list can be read in any order, by anybody, from a disk or
from object storage. Names are those of the unpacked folders, so that the result is byte for byte
that of the folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.console import Progress
from pipeline.errors import DataError
from pipeline.formats.records import DEAD_LINK
from pipeline.formats.tar import TarMember, TarScanner
from pipeline.images.header import IMAGE_SUFFIXES
from pipeline.images.left_out import printable
from pipeline.images.refused import Refused
from pipeline.sources.listing import (
    QUIET_S,
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


class _Window:
    """A part of a file as a stream that can skip."""

    def __init__(
        self,
        file: BinaryIO,
        start: int,
        size: int,
    ) -> None:
        self._file, self._at, self._end = file, start, start + size
        file.seek(start)

    def read(self, size: int = -1, /) -> bytes:
        left = self._end - self._at
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data

    def skip(self, size: int, /) -> int:
        # Seeking past an image instead of reading it: a listing reads headers only.
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

    def read_all(self, wanted: Wanted) -> Iterator[bytes | Refused]:
        """Yield the members' bytes."""
        locations = wanted.locations
        assert locations is not None, "the listing has a location per image"

        def read(i: int) -> bytes:
            file, offset = locations[i].tolist()
            return storage.read_bytes(
                wanted.files[file],
                offset,
                wanted.sizes[i],
            )

        return read_each(
            self.uri,
            read,
            len(wanted),
        )

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the member's name, as it would be unpacked, and its class if it has one."""
        return name_and_class(name, class_name)

    def listing(self) -> Listing:
        """Return the images by name, as unpacking would make them.

        Raises:
            DataError: A tar is cut or damaged, or there is no image in it.
        """
        files, tars, found = self._find()
        builder = ListingBuilder(self.uri)
        loose, dead = _resolve_links(found)

        # Members beside tars are not below a common folder that unpacking would leave out.
        names = [member.name for member in loose]
        common = "" if tars else _common_folder(names)
        for member in loose:
            name = member.name.removeprefix(common)
            builder.add(
                name,
                member.size,
                file=0,
                offset=member.offset,
            )
        _add_dead(builder, dead)

        empty: list[str] = []
        threads = 1 if storage.is_local(self.uri) else _SCANNERS
        with (
            Progress(
                f"Listing {storage.name_of(self.uri)}",
                total=len(tars),
                unit="tars",
                after_s=QUIET_S,
            ) as progress,
            ThreadPoolExecutor(threads, thread_name_prefix="tar") as pool,
        ):
            scanned = pool.map(lambda tar: _members(files[tar.file], tar), tars)
            for tar, (members, dead) in zip(
                tars,
                scanned,
                strict=True,
            ):
                for member in members:
                    # A member's offset is counted from the start of its own tar.
                    offset = tar.start + member.offset
                    builder.add(
                        member.name,
                        member.size,
                        file=tar.file,
                        offset=offset,
                    )
                _add_dead(builder, dead)
                if not members:
                    empty.append(tar.class_name)
                progress.advance(1, size_bytes=tar.size)
        if empty:
            named = ", ".join(printable(name) for name in sorted(empty))
            builder.left_out.notes.append(
                f"{len(empty):,} class tars hold no file and get no class number: {named}"
            )

        if not len(builder):
            raise DataError(
                f"convert: no image in {storage.redact(self.uri)}; seen: {builder.seen()}. "
                f"Expected {', '.join(IMAGE_SUFFIXES)}, or tars of them."
            )
        return builder.build(
            self._settings,
            kind="tar",
            files=files,
        )

    def _find(self) -> tuple[tuple[str, ...], list[_ClassTar], list[TarMember]]:
        """Return the files, the class tars in them, and the members outside of those."""
        is_https = self.uri.startswith("https:")
        if not is_https and storage.names_several(self.uri):
            return self._class_tars(storage.find_named(self.uri))
        if not is_https and storage.is_folder(self.uri):
            return self._class_tars(list(storage.list_files(self.uri)))
        tars: list[_ClassTar] = []
        loose: list[TarMember] = []
        size = storage.size_of(self.uri)
        buffer_bytes = _HEADER_BUFFER_BYTES
        if not storage.is_local(self.uri) and not self._is_nested(size):
            # Small members of a remote tar: reading on is cheaper than a request per header.
            buffer_bytes = _SCAN_BUFFER_BYTES
        shown = storage.redact(self.uri)
        with storage.open_read(self.uri, buffer_bytes=buffer_bytes) as stream:
            for member in TarScanner(
                _Window(
                    stream,
                    0,
                    size,
                ),
                shard=shown,
                links="yield",
            ):
                path = PurePosixPath(member.name)
                is_class_tar = path.suffix.lower() == ".tar" and member.link_to is None
                if is_class_tar and not storage.is_hidden(member.name):
                    tars.append(
                        _ClassTar(
                            0,
                            path.stem,
                            member.offset,
                            member.size,
                        )
                    )
                else:
                    loose.append(_clean(member))
        return (self.uri,), tars, loose

    def _class_tars(
        self, files: list[storage.FileInfo]
    ) -> tuple[tuple[str, ...], list[_ClassTar], list[TarMember]]:
        listed = [
            file
            for file in files
            # macOS puts a ._n01440764.tar beside every tar: it is neither a tar nor a class.
            if file.name.lower().endswith(".tar") and not storage.is_hidden(file.name)
        ]
        # Storage lists in any order; the files' numbers must depend on the source alone.
        listed.sort(key=lambda file: file.name)
        tars = [
            _ClassTar(
                number,
                PurePosixPath(file.name).stem,
                0,
                file.size_bytes,
            )
            for number, file in enumerate(listed)
        ]
        return tuple(file.uri for file in listed), tars, []

    def _is_nested(self, size: int) -> bool:
        """Return whether the first member is a tar."""
        with storage.open_read(self.uri, buffer_bytes=_HEADER_BUFFER_BYTES) as stream:
            shown = storage.redact(self.uri)
            scanner = TarScanner(
                _Window(
                    stream,
                    0,
                    size,
                ),
                shard=shown,
                links="yield",
            )
            first = next(iter(scanner), None)
        return first is not None and first.name.lower().endswith(".tar")


@dataclass(frozen=True)
class _ClassTar:
    """A tar of one class.

    Args:
        file: Number of the file that it lies in.
        class_name: Its name without extension.
        start: Byte at which it starts in the file.
        size: Its bytes.
    """

    file: int
    class_name: str
    start: int
    size: int


def _members(uri: str, tar: _ClassTar) -> tuple[list[TarMember], list[TarMember]]:
    """Return the members of a class tar, named as if unpacked into a folder of the tar's name, and
    its links to what is not in it."""
    buffer_bytes = _HEADER_BUFFER_BYTES if storage.is_local(uri) else _SCAN_BUFFER_BYTES
    shown = f"{storage.redact(uri)}: {tar.class_name}.tar at byte {tar.start}"
    with storage.open_read(uri, buffer_bytes=buffer_bytes) as stream:
        window = _Window(
            stream,
            tar.start,
            tar.size,
        )
        scanner = TarScanner(
            window,
            shard=shown,
            links="yield",
        )
        files, dead = _resolve_links([_clean(member) for member in scanner])

    def in_class(member: TarMember) -> TarMember:
        return replace(member, name=f"{tar.class_name}/{member.name}")

    return [in_class(member) for member in files], [in_class(member) for member in dead]


def _resolve_links(
    members: list[TarMember],
) -> tuple[list[TarMember], list[TarMember]]:
    """Give links the bytes of the members that they stand for.

    Args:
        members: Of one archive, files and links, with clean names.

    Returns:
        (files, and links with the place of their target's bytes; links without a target)
    """
    by_name = {member.name: member for member in members}
    resolved: list[TarMember] = []
    dead: list[TarMember] = []
    for member in members:
        target = member
        # A link may lead to a link; one that leads to itself never ends.
        passed = {member.name}
        while target.link_to is not None and target.link_to in by_name:
            target = by_name[target.link_to]
            if target.name in passed:
                break
            passed.add(target.name)
        if target.link_to is not None:
            dead.append(member)
            continue
        resolved.append(
            TarMember(member.name, member.header_offset, target.offset, target.size)
        )
    return resolved, dead


def _add_dead(builder: ListingBuilder, links: list[TarMember]) -> None:
    for link in links:
        reason = "hidden" if storage.is_hidden(link.name) else DEAD_LINK
        builder.left_out.add(reason, f"{link.name} -> {link.link_text}")


def first_members(uri: str, count: int) -> Iterator[str]:
    """Yield the names of the first files in a tar; none of a tar that cannot be read, which says
    so when it is listed."""
    size = storage.size_of(uri)
    buffer_bytes = _HEADER_BUFFER_BYTES if storage.is_local(uri) else _SCAN_BUFFER_BYTES
    with storage.open_read(uri, buffer_bytes=buffer_bytes) as stream:
        scanner = TarScanner(
            _Window(
                stream,
                0,
                size,
            ),
            shard=storage.redact(uri),
            links="yield",
        )
        with suppress(DataError):
            for member in islice(scanner, count):
                # Looking for samples among tars of tars would pass over gigabytes.
                if member.name.lower().endswith(".tar"):
                    return
                yield member.name


def _clean(member: TarMember) -> TarMember:
    # `tar -C folder .` writes ./name: unpacked that is the same file as `name`.
    name = "/".join(part for part in member.name.split("/") if part not in ("", "."))
    return replace(member, name=name)


def _common_folder(names: list[str]) -> str:
    """Return the folder that all class folders lie in: `train/` of train/n01440764/x.JPEG."""
    # Other files, such as a README beside the folder, do not count.
    images = [
        name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
    ]
    common = ""
    while images:
        first = images[0][len(common) :].partition("/")[0]
        longer = f"{common}{first}/"
        if not all(
            name.startswith(longer) and "/" in name[len(longer) :] for name in images
        ):
            break
        common = longer
    return common
