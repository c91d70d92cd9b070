"""Whether an image's pixels can be decoded: the slow, sure check behind `pipeline.verify
--full`."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress

import simplejpeg
from PIL import Image

from pipeline.images.encode import DECODER_ERRORS
from pipeline.images.header import Probe, ScreenLimits, screen
from pipeline.images.refused import Reason, Refused

_LIMITS = ScreenLimits()


def undecodable(data: bytes) -> Refused | None:
    """Return why an image cannot be decoded, or None if it can.

    Args:
        data: The encoded image.
    """
    found = screen(data, _LIMITS)
    if isinstance(found, Refused):
        return found
    if found.format == "jpeg" and found.mode in ("RGB", "L"):
        colours = "RGB" if found.mode == "RGB" else "GRAY"
        # libjpeg's word alone is too strict in places, such as stray bytes: then Pillow decides.
        with suppress(ValueError):
            pixels_HWC = simplejpeg.decode_jpeg(data, colours)
            height, width = pixels_HWC.shape[:2]
            return _compare_size(found, width, height)
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that the screen has already let through.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                width, height = image.size
    except DECODER_ERRORS:
        return Refused(Reason.UNDECODABLE)
    return _compare_size(found, width, height)


def _compare_size(found: Probe, width: int, height: int) -> Refused | None:
    if (width, height) == (found.width, found.height):
        return None
    detail = (
        f"{width} x {height} pixels, the header says {found.width} x {found.height}"
    )
    return Refused(Reason.SIZE_DIFFERS, detail)
