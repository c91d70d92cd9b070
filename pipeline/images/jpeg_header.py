"""What the header of a JPEG says, and whether it is of a kind that all decoders here read.

Source of all markers: ITU-T T.81, table B.1.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.images.refused import Reason, Refused

JPEG_START = b"\xff\xd8\xff"
"""How every JPEG begins: the marker SOI, and the first byte of the next marker."""
JPEG_END = b"\xff\xd9"
"""The marker EOI."""
_NOT_AN_IMAGE = Refused(Reason.NOT_AN_IMAGE)
_TRUNCATED = Refused(Reason.TRUNCATED)
_MARKER = re.compile(rb"\xff([\x01-\xfe])", re.DOTALL)
"""The next marker, as libjpeg and Pillow look for it: other bytes are skipped, an FF may be
repeated, and FF 00 stands for a byte of data."""
_SOS = 0xDA
_EOI = 0xD9
_DHP = 0xDE
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))
"""TEM and the restart marks: no length follows them."""
_SKIPPED = frozenset((0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
"""Tables, applications' segments and comments. libjpeg gives up at every marker that is neither
here nor named elsewhere in this file."""
_COMMON_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
"""Baseline, extended and progressive: what every decoder reads."""
_DECODED_FRAMES = _COMMON_FRAMES | {0xC3, 0xC9, 0xCA}
"""Besides them lossless and arithmetic coding, which libjpeg-turbo 3 reads (Pillow, simplejpeg)."""
_PROGRESSIVE = frozenset((0xC2, 0xCA))
_REFUSED_FRAMES = {
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "hierarchical, lossless",
    0xCB: "lossless with arithmetic coding",
    0xCD: "hierarchical, with arithmetic coding",
    0xCE: "hierarchical, with arithmetic coding",
    0xCF: "hierarchical, lossless, with arithmetic coding",
}
"""Kinds that no decoder here reads."""
_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
"""Byte order of an EXIF block."""
_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_TRANSFORM_YCCK = 2
"""Value in Adobe's segment. Source: Adobe technical note 5116, section 18."""


class JpegHeader(NamedTuple):
    """What is known of a JPEG before it is decoded.

    Args:
        width: Stored pixels; the orientation is not applied.
        height: Likewise.
        mode: L, RGB, CMYK or YCCK.
        orientation: EXIF orientation, 1 (upright) to 8; 1 if it has none.
        progressive: In several scans.
    """

    width: int
    height: int
    mode: str
    orientation: int
    progressive: bool


def _segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int, bool]]:
    """Yield the segments from the first marker behind SOI to that of the first scan.

    Plain tuples: every image that is screened passes here, and named ones double the time.

    Yields:
        The marker's second byte; where the length begins; the length as stored, its own two bytes
        included (0 if the marker has none); whether only fill bytes stand before the marker.

    Raises:
        IndexError: The data ends before.
    """
    at = 2
    marker = 0
    while marker != _SOS:
        is_strict = True
        marker = data[at + 1] if data[at] == 0xFF else 0
        # The usual case needs no search.
        if 0 < marker < 0xFF:
            at += 2
        else:
            found = _MARKER.search(data, at)
            if found is None:
                raise IndexError("no further marker")
            # Any number of FF may precede a marker: only other bytes are strays.
            is_strict = not bytes(data[at : found.start()]).strip(b"\xff")
            marker = found[1][0]
            at = found.end()

        # No length follows these: what does is the next marker.
        if marker in _STANDALONE or marker == _EOI:
            yield marker, at, 0, is_strict
            continue
        length = (data[at] << 8) | data[at + 1]
        yield marker, at, length, is_strict
        at += length


def read_jpeg_header(data: bytes) -> JpegHeader | Refused:
    """Return what the header says, or why the image is not decoded.

    Args:
        data: The whole file, which begins with `JPEG_START`.

    Raises:
        IndexError: The data ends inside the header.
    """
    orientation = 1
    transform = -1
    frame: tuple[int, int] | None = None
    scan_at = 0
    for marker, start, length, _ in _segments(data):
        if length < 2:
            if marker in _STANDALONE:
                continue
            # The image ends before a scan, or a segment is shorter than its own length.
            return _NOT_AN_IMAGE
        # Most segments are of these: they are asked for first.
        if marker in _SKIPPED:
            if marker == 0xE1 and data[start + 2 : start + 8] == b"Exif\0\0":
                orientation = read_orientation(data[start + 8 : start + length])
            elif marker == 0xEE and data[start + 2 : start + 7] == b"Adobe":
                transform = data[start + 13]
        elif marker in _DECODED_FRAMES or marker in _REFUSED_FRAMES:
            # Judged below: what is cut or has no scan is called so, whatever its frame.
            frame = marker, start
        elif marker == _SOS:
            scan_at = start
        elif marker == _DHP:
            return Refused(
                Reason.UNDECODABLE, "a hierarchical JPEG, which no decoder here reads"
            )
        else:
            return _NOT_AN_IMAGE

    if frame is None:
        return _NOT_AN_IMAGE
    # Cameras and tools append bytes behind the end mark, so it need not be the last.
    if not (data.endswith(JPEG_END) or data.rfind(JPEG_END, scan_at) >= 0):
        return _TRUNCATED
    return _of_frame(data, *frame, orientation, transform)


def _of_frame(
    data: bytes, marker: int, start: int, orientation: int, transform: int
) -> JpegHeader | Refused:
    """Judge a frame's header: precision, height, width, number of components."""
    if marker in _REFUSED_FRAMES:
        kind = _REFUSED_FRAMES[marker]
        return Refused(
            Reason.UNDECODABLE, f"a JPEG of a kind that no decoder here reads: {kind}"
        )
    # Behind the segment's length. A height of 0 (it follows in DNL) is refused by `probe`.
    precision, height, width, channels = struct.unpack_from(">BHHB", data, start + 2)
    if precision != 8:
        return Refused(
            Reason.UNDECODABLE,
            f"a JPEG of {precision} bits per sample; decoders here read 8",
        )
    mode = _MODES.get(channels)
    if mode is None:
        return _NOT_AN_IMAGE
    if mode == "CMYK" and transform == _TRANSFORM_YCCK:
        mode = "YCCK"
    return JpegHeader(width, height, mode, orientation, marker in _PROGRESSIVE)


def is_common(data: memoryview) -> bool:
    """Return whether a JPEG is one that any decoder takes: 8 bits, baseline or progressive, and no
    stray bytes between its segments.

    Those of GPUs and the parser of DALI know only such files; libjpeg-turbo reads the others.

    Args:
        data: The whole file, which begins with `JPEG_START`.
    """
    has_frame = False
    try:
        for marker, start, length, is_strict in _segments(data):
            if not is_strict or length < 2:
                return False
            # Tables (C4, CC) lie in the same range as frames.
            if 0xC0 <= marker <= 0xCF and marker not in _SKIPPED:
                has_frame = marker in _COMMON_FRAMES and data[start + 2] == 8
                if not has_frame:
                    return False
    except IndexError:
        return False
    return has_frame


def orientation_values(data: bytes) -> Iterator[tuple[int, str]]:
    """Yield each EXIF orientation of a JPEG: where its two bytes stand, and their order as struct
    writes it."""
    for marker, start, length, _ in _segments(data):
        if marker != 0xE1 or data[start + 2 : start + 8] != b"Exif\0\0":
            continue
        tiff = data[start + 8 : start + length]
        order = _ORDERS.get(tiff[:4])
        try:
            entry = None if order is None else _find_orientation(tiff, order)
        except struct.error:
            continue
        if order is not None and entry is not None:
            # Tag, type and count come before the value.
            yield start + 8 + entry + 8, order


def read_orientation(tiff: bytes) -> int:
    """Return tag 0x0112 of the first directory; a broken EXIF block counts as upright."""
    order = _ORDERS.get(tiff[:4])
    if order is None:
        return 1
    try:
        at = _find_orientation(tiff, order)
        if at is None:
            return 1
        _, kind, _, value = struct.unpack_from(order + "HHIH", tiff, at)
    except struct.error:
        return 1
    return value if kind == 3 and 1 <= value <= 8 else 1


def _find_orientation(tiff: bytes, order: str) -> int | None:
    """Return where the entry of tag 0x0112 begins; None if the first directory has none.

    Raises:
        struct.error: The block ends before its directory does.
    """
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(count):
        at = start + 2 + 12 * entry
        if struct.unpack_from(order + "H", tiff, at)[0] == 0x0112:
            return int(at)
    return None
