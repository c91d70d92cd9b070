"""Smaller copies of images: what `pipeline.convert --resize` stores."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageCms, ImageOps

from pipeline.images.header import Probe
from pipeline.images.refused import Reason, Refused


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB; 16-bit grey keeps its high byte, transparency is
    dropped."""
    if image.mode.startswith("I"):
        # The high byte. Mode I has 32 bits, of which a picture uses 16: others are cut off.
        high_HW = (np.asarray(image) >> 8).clip(0, 255)
        grey_HW = high_HW.astype(np.uint8)
        return Image.fromarray(grey_HW).convert("RGB")
    # Directly, Pillow would warn of a palette's transparency that is given as bytes.
    if image.mode in ("P", "PA") and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
)
"""Pillow has no one exception for a broken file; these are what its decoders raise."""
_PROFILE_SEARCH_BYTES = 65_536


def reencode(
    data: bytes,
    found: Probe,
    *,
    short_side: int | None,
    long_side: int | None = None,
    quality: int,
) -> bytes | Refused:
    """Return a JPEG whose sides are at most `short_side` and `long_side`, or why it cannot be
    made.

    Upright (EXIF applied), sRGB (an embedded profile is converted), CMYK converted, alpha dropped,
    first frame only, grey stays grey, never enlarged. Bicubic with antialiasing. A JPEG that is all
    this already keeps its bytes.

    Args:
        data: The encoded image.
        found: What its header says.
        short_side: Pixels of the shorter side, or no limit.
        long_side: Pixels of the longer side, or no limit.
        quality: JPEG quality, 1 to 100.
    """
    if _is_fine(data, found, short_side, long_side):
        return data
    buffer = io.BytesIO()
    try:
        shrunk = _shrunk(
            data,
            short_side,
            long_side,
            upright=_is_upright(found),
        )
        shrunk.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()
    except DECODER_ERRORS:
        return Refused(Reason.UNDECODABLE)


def to_pixels(
    data: bytes,
    *,
    short_side: int | None,
    long_side: int | None,
) -> tuple[Probe, bytes] | Refused:
    """Return an image as bare RGB pixels, shrunk and made plain as `reencode` does, or why they
    cannot be made.

    Returns:
        What the pixels are, and height x width x 3 bytes.
    """
    try:
        image = _shrunk(data, short_side, long_side).convert("RGB")
    except DECODER_ERRORS:
        return Refused(Reason.UNDECODABLE)
    return Probe("raw", image.width, image.height, "RGB"), image.tobytes()


def as_png(pixels: bytes, width: int, height: int) -> bytes:
    """Return bare RGB pixels as a PNG file, which loses nothing."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shrunk_size(
    width: int,
    height: int,
    *,
    short_side: int | None,
    long_side: int | None,
) -> tuple[int, int]:
    """Return width and height after shrinking; never larger."""
    scales = [1.0]
    if short_side is not None:
        scales.append(short_side / min(width, height))
    if long_side is not None:
        scales.append(long_side / max(width, height))
    scale = min(scales)
    if scale == 1:
        return width, height
    # A strip may shrink to less than half a pixel.
    return max(1, round(width * scale)), max(1, round(height * scale))


def _is_upright(found: Probe) -> bool:
    # The probe does not read the orientation of other formats.
    return found.format == "jpeg" and found.orientation == 1


def _shrunk(
    data: bytes,
    short_side: int | None,
    long_side: int | None,
    *,
    upright: bool = False,
) -> Image.Image:
    """Decode an image: upright, 8-bit sRGB or grey, shrunk. One that is known to be upright is not
    copied for it."""
    with warnings.catch_warnings():
        # Pillow warns of sizes that the screen has already let through.
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            turned = image if upright else ImageOps.exif_transpose(image)
            plain = _plain(turned)
            size = shrunk_size(
                *plain.size,
                short_side=short_side,
                long_side=long_side,
            )
            # A fully decoded copy in either case: the file is closed on return.
            if size == plain.size:
                return plain.copy()
            return plain.resize(size, Image.Resampling.BICUBIC)


def _is_fine(
    data: bytes,
    found: Probe,
    short_side: int | None,
    long_side: int | None,
) -> bool:
    """Return whether a JPEG is small, plain and upright already."""
    size = found.width, found.height
    shrunk = shrunk_size(
        *size,
        short_side=short_side,
        long_side=long_side,
    )
    if shrunk != size:
        return False
    if not _is_upright(found) or found.mode not in ("RGB", "L"):
        return False
    # Profiles stand in front: the pixels of a large image are not searched for the name.
    return b"ICC_PROFILE" not in data[:_PROFILE_SEARCH_BYTES]


def _plain(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit sRGB or grey."""
    if image.mode.startswith("I"):
        # 16 bits per pixel: the high byte. Pillow's own conversion would clip at 255.
        wide = image.convert("I")
        return wide.point(lambda value: value * (1 / 256)).convert("L")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        # A broken profile says nothing about the pixels.
        with suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(
                image,
                source,
                target,
                outputMode="RGB",
            )
            if converted is not None:
                return converted
    if image.mode in ("RGB", "L"):
        return image
    # Grey stays grey: three equal planes would take three times the room.
    is_grey = image.mode in ("1", "LA")
    return image.convert("L" if is_grey else "RGB")
