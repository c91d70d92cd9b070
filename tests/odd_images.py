"""Makes images that Pillow does not write: stray bytes, lossless JPEG, BigTIFF, old bitmaps."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

START_OF_SCAN = 0xDA


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def marker_places(data: bytes) -> list[int]:
    """Give where each marker of a plain JPEG stands, from behind SOI to that of the scan."""
    at = 2
    places = [at]
    while data[at + 1] != START_OF_SCAN:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        places.append(at)
    return places


def with_strays(data: bytes, strays: dict[int, bytes]) -> bytes:
    """Put bytes in front of markers, which are counted from 0."""
    places = marker_places(data)
    out = data[: places[0]]
    for number, at in enumerate(places):
        end = places[number + 1] if number + 1 < len(places) else len(data)
        out += strays.get(number, b"") + data[at:end]
    return out


def with_frame(data: bytes, *, marker: int, precision: int = 8) -> bytes:
    """Declare a baseline JPEG to be of another kind; what is coded stays baseline."""
    at = data.index(b"\xff\xc0")
    return (
        data[: at + 1]
        + bytes([marker])
        + data[at + 2 : at + 4]
        + bytes([precision])
        + data[at + 5 :]
    )


def lossless_jpeg(pixels: np.ndarray, *, bits: int = 8) -> bytes:
    """Encode grey pixels as SOF3 with the predictor "left". Source: ITU-T T.81, annex H."""
    height, width = pixels.shape
    values = pixels.astype(int)
    code_bits = 5
    counts = bytes(bits + 1 if length == code_bits else 0 for length in range(1, 17))
    tables = bytes([0]) + counts + bytes(range(bits + 1))
    text = ""
    for y in range(height):
        for x in range(width):
            above = values[y - 1, x] if y else 1 << (bits - 1)
            difference = int(values[y, x] - (values[y, x - 1] if x else above))
            size = abs(difference).bit_length()
            text += format(size, f"0{code_bits}b")
            if size:
                code = difference if difference > 0 else difference + (1 << size) - 1
                text += format(code, f"0{size}b")
    text += "1" * (-len(text) % 8)
    coded = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHB", bits, height, width, 1) + b"\x01\x11\0"
    scan = b"\x01\x01\0\x01\0\0"
    segments = ((0xC3, frame), (0xC4, tables), (START_OF_SCAN, scan))
    head = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
        for marker, body in segments
    )
    return b"\xff\xd8" + head + coded + b"\xff\xd9"


def big_tiff(
    image: Image.Image, *, order: str = "<", num_strips: int = 1, pages: int = 1
) -> bytes:
    """Encode an image without compression as BigTIFF."""
    channels = len(image.getbands())
    photometric = {"RGB": 2, "RGBA": 2, "CMYK": 5}.get(image.mode, 1)
    pixels = image.tobytes()
    rows = -(-image.height // num_strips)
    strip_bytes = rows * image.width * channels
    strips = [
        pixels[at : at + strip_bytes] for at in range(0, len(pixels), strip_bytes)
    ]
    out = bytearray(
        (b"II" if order == "<" else b"MM") + struct.pack(order + "HHHQ", 43, 8, 0, 16)
    )
    for page in range(pages):
        start = len(out)
        count = 10 if channels != 4 or image.mode == "CMYK" else 11
        behind = start + 8 + 20 * count + 8
        extra = b""

        def entry(tag: int, kind: str, *values: int, behind: int = behind) -> bytes:
            nonlocal extra
            code = {"H": 3, "I": 4, "Q": 16}[kind]
            body = struct.pack(f"{order}{len(values)}{kind}", *values)
            if len(body) > 8:
                place = behind + len(extra)
                extra += body
                body = struct.pack(order + "Q", place)
            return struct.pack(order + "HHQ", tag, code, len(values)) + body.ljust(
                8, b"\0"
            )

        # Filled in twice: where the strips lie follows from how long what precedes them is.
        offsets = [0] * len(strips)
        for _ in range(2):
            extra = b""
            entries = [
                entry(256, "I", image.width),
                entry(257, "I", image.height),
                entry(258, "H", *[8] * channels),
                entry(259, "H", 1),
                entry(262, "H", photometric),
                entry(273, "Q", *offsets),
                entry(277, "H", channels),
                entry(278, "I", rows),
                entry(279, "Q", *map(len, strips)),
                entry(284, "H", 1),
            ]
            if count == 11:
                entries.append(entry(338, "H", 2))
            at = behind + len(extra)
            offsets = []
            for strip in strips:
                offsets.append(at)
                at += len(strip)
        following = at if page + 1 < pages else 0
        out += struct.pack(order + "Q", count) + b"".join(entries)
        out += struct.pack(order + "Q", following) + extra + b"".join(strips)
    return bytes(out)


def bitmap(
    image: Image.Image, *, header_bytes: int, bits: int = 24, top_down: bool = False
) -> bytes:
    """Encode an image as a bitmap with a header of this size.

    Args:
        image: RGB.
        header_bytes: 12 (OS/2), 40 (Windows 3), 52, 56 (with masks), 64 (OS/2 2), 108 or 124.
        bits: 24 or 32.
        top_down: Negative height; not for 12.
    """
    raw = image.tobytes("raw", "BGR" if bits == 24 else "BGRX")
    row = image.width * bits // 8
    padding = b"\0" * (-row % 4)
    lines = [raw[at : at + row] + padding for at in range(0, len(raw), row)]
    if not top_down:
        lines.reverse()
    pixels = b"".join(lines)
    if header_bytes == 12:
        header = struct.pack("<IHHHH", 12, image.width, image.height, 1, bits)
    else:
        height = -image.height if top_down else image.height
        header = struct.pack(
            "<IiiHHIIiiII",
            header_bytes,
            image.width,
            height,
            1,
            bits,
            0,
            len(pixels),
            0,
            0,
            0,
            0,
        ).ljust(header_bytes, b"\0")
    start = 14 + len(header)
    return (
        struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start)
        + header
        + pixels
    )
