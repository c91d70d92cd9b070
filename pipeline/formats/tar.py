"""A strict reader of tar headers: what tarfile and webdataset skip in silence is an error here.

Read: ustar with its prefix field, GNU long names, PAX `path`, `linkpath` and `size`, old v7
headers. Refused: devices, sparse members, absolute names and `..`; links too, unless the caller
asks for them: then a link is a name for another member, never for a file of this machine. Checked:
every header's checksum, every member's length, zero padding of the end. An archive must end with at
least one zero block: without it a file that was cut between two members could not be told from a
whole one. (Two zero blocks are the standard; one is accepted, because no member can be missing
then.)
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol, runtime_checkable

from pipeline.errors import DataError
from pipeline.formats.compressed import GZIP, compression_of_bytes

BLOCK_BYTES = 512
"""Unit of a tar file. Source: POSIX.1-2024, pax, "ustar Interchange Format"."""
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_MAX_EXTENSION_BYTES = 2**20
"""Longest PAX or GNU long-name record that is read; a name of a megabyte is not a name."""
_CHUNK_BYTES = 2**20
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}


_DAMAGED = (
    "The file was cut, damaged or badly made: copy it again from its source, or convert the images "
    "again with pipeline.convert."
)
_REFUSED = (
    "Copying the file again does not help: pack it again without that member, or unpack it into a "
    "folder and convert that with pipeline.convert."
)
BADLY_GROUPED = (
    "Copying the file again does not help: pack it again with the members of a sample side by side "
    "under a key of their own, or unpack it into a folder and convert that with pipeline.convert."
)
"""What to do about members that make no samples."""


class Stream(Protocol):
    """What is read from: anything with `read`."""

    def read(self, size: int = ..., /) -> bytes:
        """Return up to `size` bytes."""


@runtime_checkable
class SkippingStream(Protocol):
    """A stream that can pass over bytes without reading them: of an archive's members only the
    headers are read."""

    def skip(self, size: int, /) -> int:
        """Pass over up to `size` bytes; return how many there were."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """One file of an archive.

    Args:
        name: Its path in the archive.
        header_offset: Where its header starts, extension headers not counted.
        offset: First byte of its data.
        size: Bytes of data.
        link_to: For a link, the path in the archive that it stands for, or empty if it leads out of
            the archive; None for a file.
        link_text: For a link, its target as it is written.
    """

    name: str
    header_offset: int
    offset: int
    size: int
    link_to: str | None = None
    link_text: str = ""


class TarScanner:
    """Walks an archive from its first byte to its last, one member at a time.

    Args:
        stream: The archive, at its start.
        shard: What to call it in errors.
        links: `refuse` them, or `yield` them as members without data.
    """

    def __init__(
        self,
        stream: Stream | BinaryIO,
        *,
        shard: str,
        links: Literal["refuse", "yield"] = "refuse",
    ) -> None:
        self._stream = stream
        self._shard = shard
        self._allowed = b"127" if links == "yield" else b"7"
        self._at = 0
        self._pending = (
            0  # data and padding of the current member that is still to be read
        )
        self._data_left = 0
        self._name = ""
        self.num_members = 0

    def error(
        self, what: str, *, offset: int | None = None, remedy: str = _DAMAGED
    ) -> DataError:
        """Return an error that names the shard, the place and the count of whole members before
        it.

        Args:
            what: What is wrong.
            offset: Byte at which it is; None: where the scanner stands.
            remedy: What to do next.
        """
        place = self._at if offset is None else offset
        return DataError(
            f"{self._shard}: {what} at byte {place}, after {self.num_members} whole members. "
            f"{remedy}"
        )

    def _read_exactly(self, size: int, what: str) -> bytes:
        start = self._at
        parts: list[bytes] = []
        left = size
        while left and (part := self._stream.read(left)):
            parts.append(part)
            left -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._at += len(data)
        if left:
            raise self.error(
                f"the file ends inside {what}: expected {size} bytes, got {len(data)}",
                offset=start,
            )
        return data

    def __iter__(self) -> Iterator[TarMember]:
        """Yield the regular files; call `read` before asking for the next to get the data."""
        long_name: str | None = None
        long_link: str | None = None
        pax: dict[str, str] = {}
        while (header := self._next_header()) is not None:
            start = self._at - BLOCK_BYTES
            kind, size = header[156:157], self._size(header, start)
            if kind in (b"x", b"g", b"L", b"K"):
                record = self._extension(size, start)
                if kind == b"x":
                    pax = self._pax(record, start)
                elif kind == b"L":
                    long_name = self._text(record.rstrip(b"\0"), start)
                elif kind == b"K":
                    long_link = self._link_text(record.rstrip(b"\0"))
                continue
            size = self._pax_size(pax, size, start)
            name = pax.get("path") or long_name or self._header_name(header, start)
            header_link = self._link_text(header[157:257].split(b"\0", 1)[0])
            target = pax.get("linkpath") or long_link or header_link
            long_name = None
            long_link = None
            pax = {}
            self._refuse(name, kind, start)
            if kind in (b"1", b"2"):
                # A link has no data, whatever size its header gives.
                self._begin(name, 0)
                yield TarMember(
                    name, start, self._at, 0, _inside(name, kind, target), target
                )
                self.num_members += 1
                continue
            if kind == b"5":
                self._begin(name, 0)
                continue
            self._begin(name, size)
            yield TarMember(name, start, self._at, size)
            self._finish_member()
            self.num_members += 1
        if long_name is not None or pax:
            raise self.error(
                "the archive ends after an extended header that describes no member"
            )
        self._check_end()

    def _begin(self, name: str, size: int) -> None:
        self._name, self._data_left = name, size
        self._pending = size + -size % BLOCK_BYTES

    def read(self) -> bytes:
        """Return the current member's data."""
        data = self._read_exactly(self._data_left, f"the data of {self._name!r}")
        self._pending -= len(data)
        self._data_left = 0
        return data

    def read_chunks(self) -> Iterator[bytes]:
        """Yield the current member's data in pieces, for members too large to hold."""
        while self._data_left:
            part = self._read_exactly(
                min(self._data_left, _CHUNK_BYTES), f"the data of {self._name!r}"
            )
            self._data_left -= len(part)
            self._pending -= len(part)
            yield part

    def _finish_member(self) -> None:
        if isinstance(self._stream, SkippingStream) and self._pending:
            start, size = self._at, self._pending
            skipped = self._stream.skip(size)
            self._at += skipped
            self._pending = self._data_left = 0
            if skipped != size:
                raise self.error(
                    f"the file ends inside the data of {self._name!r}: expected {size} bytes, got "
                    f"{skipped}",
                    offset=start,
                )
        for _ in self.read_chunks():
            pass
        if self._pending:
            self._read_exactly(self._pending, f"the padding of {self._name!r}")
            self._pending = 0

    def _next_header(self) -> bytes | None:
        """Return the next header, or None at the archive's end mark."""
        start = self._at
        block = self._stream.read(BLOCK_BYTES)
        while (
            block
            and len(block) < BLOCK_BYTES
            and (more := self._stream.read(BLOCK_BYTES - len(block)))
        ):
            block += more
        self._at += len(block)
        packed = compression_of_bytes(block) if start == 0 else None
        if packed is not None:
            advice = (
                "Make shards of it: python -m pipeline.convert SRC DST."
                if packed is GZIP
                else f"Unpack it first: {packed.command} FILE."
            )
            raise DataError(
                f"{self._shard} is compressed with {packed.name}: no image in it can be found "
                f"without reading all before it. {advice}"
            )
        if not block:
            if start == 0:
                raise self.error("the file is empty")
            raise self.error(
                "the file ends without the end mark (a block of zeros), so members may be missing"
            )
        if len(block) < BLOCK_BYTES:
            raise self.error(
                f"the file ends inside a header: expected {BLOCK_BYTES} bytes, got {len(block)}",
                offset=start,
            )
        if block == _ZERO_BLOCK:
            return None
        stored = self._octal(block[148:156], "checksum", start)
        rest = block[:148] + b" " * 8 + block[156:]
        signed = (
            sum(byte - 256 if byte > 127 else byte for byte in rest)
            if stored != sum(rest)
            else stored
        )
        if stored not in (sum(rest), signed):  # some old writers summed signed bytes
            raise self.error(
                f"the header's checksum is {stored}, its bytes sum to {sum(rest)},",
                offset=start,
            )
        return block

    def _check_end(self) -> None:
        """Check that only zeros follow the end mark: a member there would be silently lost
        by every reader."""
        while block := self._stream.read(_CHUNK_BYTES):
            if block.count(0) != len(block):
                raise self.error(
                    "there is junk, or another archive, after the end mark"
                )
            self._at += len(block)

    def _octal(self, field: bytes, what: str, start: int) -> int:
        if field[0] & 0x80:  # GNU base-256, for sizes of 8 GiB and more
            return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        text = field.split(b"\0", 1)[0].strip()
        if not text or text.strip(b"01234567"):
            if what == "size" and not text:
                return 0
            raise self.error(
                f"the header's {what} {field!r} is not an octal number", offset=start
            )
        return int(text, 8)

    def _size(self, header: bytes, start: int) -> int:
        return self._octal(header[124:136], "size", start)

    def _extension(self, size: int, start: int) -> bytes:
        if size > _MAX_EXTENSION_BYTES:
            raise self.error(
                f"an extended header of {size} bytes (limit {_MAX_EXTENSION_BYTES}) stands",
                offset=start,
            )
        self._begin("an extended header", size)
        record = self.read()
        self._finish_member()
        return record

    def _pax(self, record: bytes, start: int) -> dict[str, str]:
        """Return the fields of a PAX record that are used; each is `<length> <name>=<value>\\n`."""
        fields: dict[str, str] = {}
        at = 0
        while at < len(record):
            head, blank, _ = record[at : at + 24].partition(b" ")
            length = int(head) if head.isdigit() else 0
            entry = record[at + len(head) + 1 : at + length]
            name, equals, value = entry[:-1].partition(b"=")
            if (
                not blank
                or length <= len(head) + 1
                or not equals
                or not entry.endswith(b"\n")
            ):
                raise self.error("a PAX header cannot be read", offset=start)
            if name.startswith(b"GNU.sparse"):
                raise self.error(
                    "a sparse file, which is refused, stands", offset=start
                )
            if name in (b"path", b"size"):
                fields[name.decode()] = self._text(value, start)
            elif name == b"linkpath":
                fields["linkpath"] = self._link_text(value)
            at += length
        return fields

    def _pax_size(self, pax: dict[str, str], size: int, start: int) -> int:
        text = pax.get("size")
        if text is None:
            return size
        if not (text.isascii() and text.isdigit()):
            raise self.error(f"the PAX size {text!r} is not a number", offset=start)
        return int(text)

    def _header_name(self, header: bytes, start: int) -> str:
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and (
            prefix := header[345:500].split(b"\0", 1)[0]
        ):
            name = prefix + b"/" + name
        return self._text(name, start)

    def _link_text(self, raw: bytes) -> str:
        # Only compared with names and shown: what is not UTF-8 is the name of no member.
        return raw.decode(errors="backslashreplace")

    def _text(self, raw: bytes, start: int) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(
                f"the name {raw[:80]!r} is not UTF-8", offset=start
            ) from None

    def _refuse(self, name: str, kind: bytes, start: int) -> None:
        is_allowed = kind in (b"0", b"\0", b"5") or kind in self._allowed
        if not is_allowed:
            found = _KINDS.get(kind, f"a member of unknown type {kind!r}")
            raise self.error(
                f"{name!r} is {found}, which is refused,", offset=start, remedy=_REFUSED
            )
        if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
            raise self.error(
                f"the member name {name!r} is absolute, empty or leaves the folder, and is refused",
                offset=start,
                remedy=_REFUSED,
            )


def _inside(name: str, kind: bytes, target: str) -> str:
    """Return the path in the archive that a link stands for; empty if it leads out of it."""
    # A symbolic link counts from its own folder, a hard link from the root of the archive.
    base = posixpath.dirname(name) if kind == b"2" else ""
    path = posixpath.normpath(posixpath.join(base, target)) if target else ".."
    is_outside = path.startswith(("/", "../")) or path in (".", "..")
    return "" if is_outside else path
