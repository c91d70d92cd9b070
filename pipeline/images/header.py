"""What an image is, from its header alone, and what may not be decoded.

No pixel is decoded here: an image that declares 20000x20000 costs as little as any other.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pydantic import Field

from pipeline.config import LoaderConfig, Settings
from pipeline.images.jpeg_header import JPEG_START, read_jpeg_header
from pipeline.images.refused import Reason, Refused
from pipeline.images.tiff_header import TIFF_STARTS, read_tiff_header

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
)
"""Endings of image files, in lower case. The content then tells what a file really is."""
_NOT_AN_IMAGE = Refused(Reason.NOT_AN_IMAGE)
_TRUNCATED = Refused(Reason.TRUNCATED)
_LOADER_DEFAULTS = LoaderConfig()
_TAIL_BYTES = 4096
_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
"""Colour types. Source: PNG specification (third edition), table 11.1."""
_PNG_MODES_16 = {0: "I;16", 2: "RGB;16", 4: "LA;16", 6: "RGBA;16"}
_BMP_HEADER_SIZES = (
    b"\x0c\0\0\0",
    b"\x28\0\0\0",
    b"\x34\0\0\0",
    b"\x38\0\0\0",
    b"\x40\0\0\0",
    b"\x6c\0\0\0",
    b"\x7c\0\0\0",
)
"""Bytes 14 to 17: two letters at the start are too few to tell a bitmap."""
_MAGICS = (JPEG_START, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"GIF87a", *TIFF_STARTS)


class ScreenLimits(Settings):
    """What is too large to decode."""

    max_pixels: int = Field(default=_LOADER_DEFAULTS.max_pixels, ge=1)
    """Width x height above which an image is refused."""
    max_bytes: int = Field(default=_LOADER_DEFAULTS.max_bytes, ge=1)
    """Encoded bytes above which an image is refused."""
    max_aspect: float = Field(default=100.0, ge=1)
    """Longer side / shorter side above which an image is refused: a strip is not a picture."""


DEFAULT_LIMITS = ScreenLimits()


class Probe(NamedTuple):
    """What an image's header says.

    Args:
        format: One of `pipeline.formats.table.FORMATS`, never `bad`.
        width: Stored pixels: an EXIF orientation is reported, not applied. Decoders see the same
            pixels.
        height: Likewise.
        mode: One of `pipeline.formats.table.MODES`.
        orientation: EXIF orientation of a JPEG, 1 (upright) to 8; 1 if it has none.
        progressive: JPEG in several scans.
        animated: More than one frame; only the first is used.
    """

    format: str
    width: int
    height: int
    mode: str
    orientation: int = 1
    progressive: bool = False
    animated: bool = False


def screen(data: bytes, limits: ScreenLimits = DEFAULT_LIMITS) -> Probe | Refused:
    """Return what an image's header says, or the reason not to decode it.

    Args:
        data: The whole encoded image.
        limits: What is too large.
    """
    if len(data) > limits.max_bytes:
        return Refused(Reason.TOO_MANY_BYTES)
    found = probe(data)
    if isinstance(found, Refused):
        return found
    return refuse_size(found.width, found.height, limits) or found


def refuse_size(
    width: int, height: int, limits: ScreenLimits = DEFAULT_LIMITS
) -> Refused | None:
    """Return the reason not to decode an image of this size, or None."""
    if width * height > limits.max_pixels:
        return Refused(Reason.TOO_MANY_PIXELS)
    if max(width, height) > limits.max_aspect * min(width, height):
        return Refused(Reason.ASPECT)
    return None


def probe(data: bytes) -> Probe | Refused:
    """Return what an image's header says, or why it is not a whole image; limits are not applied.

    The format is told by the content, never by the name.
    """
    if not data:
        return Refused(Reason.EMPTY)
    try:
        found = _probe(data)
    except (struct.error, IndexError, OverflowError):
        return _TRUNCATED
    if isinstance(found, Probe) and (found.width < 1 or found.height < 1):
        return _NOT_AN_IMAGE
    return found


def _probe(data: bytes) -> Probe | Refused:
    if data[:3] == JPEG_START:
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    # Not Pillow's lazy open for the next three: it opens a file that was cut, and gives bitmaps of
    # one bit, of greys and with transparency other modes than manifests have had so far.
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(data)
    if data[:4] in TIFF_STARTS:
        return _tiff(data)
    if data[:2] == b"BM" and data[14:18] in _BMP_HEADER_SIZES:
        return _bmp(data)
    # A file that was cut inside its first bytes, as opposed to one of another kind.
    if any(len(data) < len(magic) and magic.startswith(data) for magic in _MAGICS):
        return _TRUNCATED
    return _NOT_AN_IMAGE


def _jpeg(data: bytes) -> Probe | Refused:
    header = read_jpeg_header(data)
    if isinstance(header, Refused):
        return header
    return Probe(
        "jpeg",
        header.width,
        header.height,
        header.mode,
        header.orientation,
        header.progressive,
    )


def _png(data: bytes) -> Probe | Refused:
    if len(data) < 33:
        return _TRUNCATED
    if data[12:16] != b"IHDR":
        return _NOT_AN_IMAGE
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    modes = _PNG_MODES_16 if depth == 16 else _PNG_MODES
    mode = modes.get(colour)
    if mode is None:
        return _NOT_AN_IMAGE
    # The usual end is the last chunk; tools append bytes behind it.
    if data[-8:-4] != b"IEND" and data.rfind(b"IEND\xaeB`\x82") < 0:
        return _TRUNCATED
    # The animation's chunk stands before the pixels.
    is_animated = data.find(b"acTL", 33, _TAIL_BYTES) >= 0
    return Probe(
        "png",
        width,
        height,
        mode,
        animated=is_animated,
    )


def _webp(data: bytes) -> Probe | Refused:
    # RIFF's size counts from behind itself.
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    if riff_bytes + 8 > len(data):
        return _TRUNCATED
    chunk = data[12:16]
    if chunk == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            return _NOT_AN_IMAGE
        width, height = struct.unpack_from("<HH", data, 26)
        # The two high bits of each are a scale, which decoders do not apply.
        return Probe(
            "webp",
            width & 0x3FFF,
            height & 0x3FFF,
            "RGB",
        )
    if chunk == b"VP8L":
        if data[20] != 0x2F:
            return _NOT_AN_IMAGE
        (bits,) = struct.unpack_from("<I", data, 21)
        width = (bits & 0x3FFF) + 1
        height = (bits >> 14 & 0x3FFF) + 1
        has_alpha = bits >> 28 & 1
        mode = "RGBA" if has_alpha else "RGB"
        return Probe("webp", width, height, mode)
    if chunk == b"VP8X":
        flags = data[20]
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        if len(data) < 30:
            return _TRUNCATED
        mode = "RGBA" if flags & 0x10 else "RGB"
        return Probe(
            "webp",
            width,
            height,
            mode,
            animated=bool(flags & 0x02),
        )
    return _NOT_AN_IMAGE


def _gif(data: bytes) -> Probe | Refused:
    width, height = struct.unpack_from("<HH", data, 6)
    if data.rstrip(b"\0")[-1:] != b"\x3b":
        return _TRUNCATED
    at = 13 + _gif_table_bytes(data[10])
    frames = 0
    # Two frames are enough to know that it moves.
    while frames < 2 and data[at] in (0x21, 0x2C):  # an extension, an image
        if data[at] == 0x2C:
            frames += 1
            at += 11 + _gif_table_bytes(data[at + 9])
        else:
            at += 2
        while data[at]:  # sub-blocks, each led by its length
            at += 1 + data[at]
        at += 1
    if not frames:
        return _NOT_AN_IMAGE
    return Probe("gif", width, height, "P", animated=frames > 1)


def _gif_table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _bmp(data: bytes) -> Probe | Refused:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    height = abs(height)  # a negative height means top-down

    (start,) = struct.unpack_from("<I", data, 10)
    row_bytes = (width * bits + 31) // 32 * 4
    # Of compressed pixels only a decoder knows where they end.
    if compression in (0, 3) and start + row_bytes * height > len(data):
        return _TRUNCATED
    # These two headers have no mask for alpha: the fourth byte is padding.
    if bits == 32 and header_bytes not in (52, 64):
        return Probe("bmp", width, height, "RGBA")
    return Probe("bmp", width, height, "RGB" if bits > 8 else "P")


def _tiff(data: bytes) -> Probe | Refused:
    header = read_tiff_header(data)
    if isinstance(header, Refused):
        return header
    return Probe(
        "tiff",
        header.width,
        header.height,
        header.mode,
        animated=header.has_more_pages,
    )
