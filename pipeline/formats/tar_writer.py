"""Headers and end mark of the tars that are written: equal content gives equal bytes."""

from __future__ import annotations

from pipeline.errors import DataError
from pipeline.formats.tar import BLOCK_BYTES


def make_header(name: str, size: int) -> bytes:
    """Return the header of a regular file: ustar if the name fits, preceded by a PAX header
    if it does not.

    Owner, group, mode and time are fixed, so that equal content gives equal bytes.

    Args:
        name: Path in the archive.
        size: Bytes of data, below 8 GiB.
    """
    raw = name.encode()
    if len(raw) <= 100 and name.isascii():
        return _ustar(raw, size, b"0")
    record = b"path=" + raw + b"\n"
    length = len(record) + 3
    while (
        len(f"{length} ".encode() + record) != length
    ):  # the length counts its own digits
        length += 1
    body = f"{length} ".encode() + record
    plain = name.encode("ascii", "replace").replace(b"?", b"_")[-100:]
    return (
        _ustar(b"PaxHeader", len(body), b"x")
        + body
        + bytes(-len(body) % BLOCK_BYTES)
        + _ustar(plain, size, b"0")
    )


_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"\0" + b"00000000000\0"
_REST = bytes(100) + b"ustar\x0000" + bytes(32 * 2) + b"0000000\0" * 2 + bytes(155 + 12)
_FIXED_SUM = sum(_OWNER + _TIME + b" " * 8 + _REST)
"""What is the same in every header that is written: mode and owner, time, and all that follows the
type."""


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    if size >= 8**11:
        raise DataError(
            f"{name!r}: {size} bytes do not fit a tar header (limit {8**11 - 1})."
        )
    digits = b"%011o" % size
    checksum = (
        sum(name) + sum(digits) + sum(kind) + _FIXED_SUM
    )  # of all bytes, its own field taken as blanks
    return b"".join(
        (
            name.ljust(100, b"\0"),
            _OWNER,
            digits,
            _TIME,
            b"%06o\0 " % checksum,
            kind,
            _REST,
        )
    )


def end_mark(size_bytes: int) -> bytes:
    """Return the zeros that end an archive of this many bytes so far: two blocks, then up to a
    record of 10 KiB."""
    record = 20 * BLOCK_BYTES
    return bytes(2 * BLOCK_BYTES + -(size_bytes + 2 * BLOCK_BYTES) % record)
