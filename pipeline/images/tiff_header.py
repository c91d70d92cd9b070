"""What the header of a TIFF or BigTIFF says.

Source: TIFF 6.0, sections 2 and 8; BigTIFF as libtiff 4 documents it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pipeline.images.refused import Reason, Refused

_BIG_START = b"II+\0"
_BIG_START_BIG_ENDIAN = b"MM\0+"
TIFF_STARTS = (b"II*\0", b"MM\0*", _BIG_START, _BIG_START_BIG_ENDIAN)
"""Byte order and version: 42, or 43 for BigTIFF."""
_VALUE_FORMATS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_VALUE_BYTES = {
    **{
        1: 1,
        2: 1,
        3: 2,
        4: 4,
        5: 8,
        6: 1,
        7: 1,
        8: 2,
        9: 4,
        10: 8,
        11: 4,
        12: 8,
        13: 4,
    },
    **{16: 8, 17: 8, 18: 8},
}
"""Bytes of one value by type; those of 16 and above are BigTIFF's."""
_MOST_VALUES = 1_000_000
_WIDTH = 256
_HEIGHT = 257
_BITS = 258
_PHOTOMETRIC = 262
_SAMPLES = 277
_SPANS = ((273, 279), (324, 325))
"""Offsets and byte counts of strips, and of tiles."""
_PHOTOMETRIC_PALETTE = 3
_PHOTOMETRIC_CMYK = 5


class TiffHeader(NamedTuple):
    """What is known of a TIFF before it is decoded.

    Args:
        width: Pixels of the first page.
        height: Likewise.
        mode: One of `pipeline.formats.table.MODES`.
        has_more_pages: Only the first is used.
    """

    width: int
    height: int
    mode: str
    has_more_pages: bool


class _Layout(NamedTuple):
    """How numbers are stored.

    Args:
        order: Byte order, as struct writes it.
        offset: struct's letter for a place in the file, and for the count of an entry's values.
        number: struct's letter for the number of entries.
        value_bytes: Bytes that an entry has room for.
    """

    order: str
    offset: str
    number: str
    value_bytes: int

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry: tag, type, count, value."""
        return 4 + 2 * self.value_bytes


def read_tiff_header(data: bytes) -> TiffHeader | Refused:
    """Return what the header says, or why it is not a whole image.

    Args:
        data: The whole file, which begins with one of `TIFF_STARTS`.

    Raises:
        struct.error: The data ends inside the header.
    """
    order = "<" if data[:2] == b"II" else ">"
    # Pillow 13 takes one for a plain TIFF, and finds no size in it.
    if data[:4] == _BIG_START_BIG_ENDIAN:
        return Refused(
            Reason.UNDECODABLE,
            "a BigTIFF in big-endian order, which no decoder here reads",
        )
    if data[:4] == _BIG_START:
        layout = _Layout(order, "Q", "Q", 8)
        # Behind the version: 8 bytes per offset, and two zero bytes.
        if struct.unpack_from(order + "HH", data, 4) != (8, 0):
            return Refused(Reason.NOT_AN_IMAGE)
    else:
        layout = _Layout(order, "I", "H", 4)
    (start,) = struct.unpack_from(order + layout.offset, data, layout.value_bytes)
    (count,) = struct.unpack_from(order + layout.number, data, start)
    first = start + struct.calcsize(order + layout.number)
    tags = _read_tags(data, layout, first, count)
    if tags is None:
        return Refused(Reason.TRUNCATED)
    if _WIDTH not in tags or _HEIGHT not in tags:
        return Refused(Reason.NOT_AN_IMAGE)

    # A TIFF has no end mark: it is whole if every strip or tile is.
    for starts, lengths in _SPANS:
        # A damaged file may have more of the one than of the other.
        spans = zip(
            tags.get(starts, ()),
            tags.get(lengths, ()),
            strict=False,
        )
        ends = [begin + length for begin, length in spans]
        if ends and max(ends) > len(data):
            return Refused(Reason.TRUNCATED)

    end = first + layout.entry_bytes * count
    (next_directory,) = struct.unpack_from(order + layout.offset, data, end)
    return TiffHeader(
        width=tags[_WIDTH][0],
        height=tags[_HEIGHT][0],
        mode=_mode(tags),
        has_more_pages=bool(next_directory),
    )


def _read_tags(
    data: bytes, layout: _Layout, first: int, count: int
) -> dict[int, tuple[int, ...]] | None:
    """Return the whole-number values of a directory by tag; None if a value of any kind lies
    outside the file."""
    order = layout.order
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(count):
        at = first + layout.entry_bytes * entry
        tag, kind, number = struct.unpack_from(f"{order}HH{layout.offset}", data, at)
        # A few bytes stand in the entry itself, more at the place that it names.
        value_at = at + 4 + layout.value_bytes
        value_bytes = _VALUE_BYTES.get(kind, 1) * number
        if value_bytes > layout.value_bytes:
            (value_at,) = struct.unpack_from(order + layout.offset, data, value_at)
            # A profile or other value may be stored behind the pixels.
            if value_at + value_bytes > len(data):
                return None
        # A damaged count must not take gigabytes.
        if kind in _VALUE_FORMATS and 1 <= number <= _MOST_VALUES:
            values = f"{order}{number}{_VALUE_FORMATS[kind]}"
            tags[tag] = struct.unpack_from(values, data, value_at)
    return tags


def _mode(tags: dict[int, tuple[int, ...]]) -> str:
    samples = tags.get(_SAMPLES, (1,))[0]
    bits = tags.get(_BITS, (1,))[0]
    photometric = tags.get(_PHOTOMETRIC, (1,))[0]
    # A palette or CMYK is told by its meaning, before the number of samples is looked at.
    if photometric == _PHOTOMETRIC_CMYK:
        return "CMYK"
    if photometric == _PHOTOMETRIC_PALETTE:
        return "P"
    if samples > 3:
        return "RGBA"
    if samples == 3:
        return "RGB"
    if bits == 16:
        return "I;16"
    return "1" if bits == 1 else "L"
