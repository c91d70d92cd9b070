"""Images turned as their EXIF orientation says, without loss: `pipeline.convert --apply-exif`.

A JPEG is turned in its coefficients by libjpeg-turbo, as jpegtran does; a PNG or a lossless WebP is
written anew with the same pixels. What this cannot do without loss is left as it is, and named.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import io
import struct
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageOps

from pipeline.errors import ConfigError
from pipeline.images.encode import DECODER_ERRORS
from pipeline.images.header import Probe
from pipeline.images.jpeg_header import orientation_values

_ORIENTATION = 0x0112
_UPRIGHT = 1
_OPERATIONS = {2: 1, 3: 6, 4: 2, 5: 3, 6: 5, 7: 4, 8: 7}
"""EXIF orientation to TJXOP: mirror, rotate by 180, flip, transpose, rotate by 90, transverse,
rotate by 270. Source: EXIF 2.32, tag 0x0112; turbojpeg.h, enum TJXOP."""
_PERFECT = 1
"""TJXOPT_PERFECT: fail if a block at the edge is not whole, as it would stay where it is."""
_PROGRESSIVE = 32
"""TJXOPT_PROGRESSIVE."""
_PNG_EXIF = (b"eXIf", b"Raw profile type exif")
"""How a PNG stores EXIF: by the standard, and as ImageMagick does."""
_LOSSLESS_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes that Pillow writes with all bits that it has read. Of 16 bits per channel it reads 8."""


@dataclass(frozen=True, slots=True)
class Unturned:
    """Stands for an image that keeps its orientation.

    Args:
        why: One line for the list of such images.
    """

    why: str


def make_upright(data: bytes, found: Probe) -> bytes | Unturned:
    """Turn an image upright; one that is upright keeps its bytes.

    The orientation in its EXIF becomes 1; all else that it stores beside the pixels is kept.

    Args:
        data: The encoded image.
        found: What its header says.
    """
    if found.format == "jpeg":
        return data if found.orientation == _UPRIGHT else _turn_jpeg(data, found)
    has_exif = {
        "png": any(name in data for name in _PNG_EXIF),
        "webp": b"EXIF" in data,
    }
    if not has_exif.get(found.format, False):
        return data
    try:
        return _turn_with_pillow(data, found)
    except DECODER_ERRORS as error:
        return Unturned(f"its EXIF orientation cannot be read: {error}")


# ------------------------------------------------------------------------------------------ JPEG
class _Transform(ctypes.Structure):
    """`tjtransform` of turbojpeg.h: the region to cut out (none), the operation, options, and a
    filter that is not used."""

    _fields_ = (
        ("x", ctypes.c_int),
        ("y", ctypes.c_int),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("operation", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    )


@cache
def turbojpeg() -> Any:
    """Load libturbojpeg.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        # `find_library` starts a compiler or ldconfig, and is not needed on Linux.
        library = ctypes.CDLL("libturbojpeg.so.0")
    except OSError:
        name = ctypes.util.find_library("turbojpeg")
        if name is None:
            raise ConfigError(
                "convert: --apply-exif needs the library libturbojpeg, which is not installed. "
                "Install it (Debian, Ubuntu: apt-get install libturbojpeg0), or leave the option "
                "out."
            ) from None
        library = ctypes.CDLL(name)
    library.tjInitTransform.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    library.tjFree.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    # (handle, source, its bytes, number of transforms, destinations, their bytes, transforms,
    # flags)
    library.tjTransform.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    ]
    return library


def _turn_jpeg(data: bytes, found: Probe) -> bytes | Unturned:
    library = turbojpeg()
    options = _PERFECT | (_PROGRESSIVE if found.progressive else 0)
    transform = _Transform(operation=_OPERATIONS[found.orientation], options=options)
    turned = ctypes.c_void_p()
    num_bytes = ctypes.c_ulong()
    handle = library.tjInitTransform()
    try:
        failed = library.tjTransform(
            *(handle, data, len(data), 1),
            *(
                ctypes.byref(turned),
                ctypes.byref(num_bytes),
                ctypes.byref(transform),
                0,
            ),
        )
        if failed:
            said = library.tjGetErrorStr2(handle).decode(errors="replace")
            return Unturned(_explain(said, found))
        return _reset_orientation(ctypes.string_at(turned, num_bytes.value))
    finally:
        # The library allocates the result, also if it fails half-way.
        library.tjFree(turned)
        library.tjDestroy(handle)


def _explain(said: str, found: Probe) -> str:
    if "not perfect" in said:
        return (
            f"orientation {found.orientation}: {found.width} x {found.height} pixels do not divide "
            "into whole blocks, so that a JPEG cannot be turned without loss"
        )
    return f"orientation {found.orientation}: libturbojpeg cannot turn it: {said}"


def _reset_orientation(data: bytes) -> bytes:
    """Write 1 in place of each EXIF orientation."""
    upright = bytearray(data)
    for at, order in orientation_values(data):
        struct.pack_into(order + "H", upright, at, _UPRIGHT)
    return bytes(upright)


# --------------------------------------------------------------------------------- other formats
def _turn_with_pillow(data: bytes, found: Probe) -> bytes | Unturned:
    with warnings.catch_warnings():
        # Pillow warns of sizes that the screen has already let through.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(_ORIENTATION, _UPRIGHT)
            if orientation not in _OPERATIONS:
                return data
            # VP8L is the only kind of WebP without loss; of the others nothing can be turned.
            is_lossy = found.format == "webp" and b"VP8L" not in data
            has_all_bits = found.mode == image.mode and image.mode in _LOSSLESS_MODES
            if found.animated or is_lossy or not has_all_bits:
                kind = "animated" if found.animated else found.mode
                return Unturned(
                    f"orientation {orientation}: a {found.format} of this kind ({kind}) cannot be "
                    "turned without loss"
                )
            return _write_like(ImageOps.exif_transpose(image), image)


def _write_like(upright: Image.Image, source: Image.Image) -> bytes:
    buffer = io.BytesIO()
    beside: dict[str, Any] = {
        name: source.info[name]
        for name in ("icc_profile", "transparency", "gamma", "dpi")
        if name in source.info
    }
    beside["exif"] = upright.getexif().tobytes()
    if source.format == "PNG":
        upright.save(buffer, "PNG", **beside)
    else:
        # `exact` keeps the colours of pixels that are transparent.
        upright.save(buffer, "WEBP", lossless=True, exact=True, **beside)
    return buffer.getvalue()
