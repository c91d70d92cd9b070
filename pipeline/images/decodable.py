"""Whether an image's pixels can be decoded: the slow, sure check behind `pipeline.verify
--full`."""

from __future__ import annotations

import io
import warnings

import simplejpeg
from PIL import Image

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
        try:
            pixels_HWC = simplejpeg.decode_jpeg(data, "RGB" if found.mode == "RGB" else "GRAY")
        except ValueError:
            pass  # libjpeg's word alone is too strict in places; Pillow decides
        else:
            height, width = pixels_HWC.shape[:2]
            return _compare_size(found, width, height)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes that the screen has let through
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                size = image.size
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return Refused(Reason.UNDECODABLE)
    return _compare_size(found, *size)


def _compare_size(found: Probe, width: int, height: int) -> Refused | None:
    if (width, height) == (found.width, found.height):
        return None
    detail = f"{width} x {height} pixels, the header says {found.width} x {found.height}"
    return Refused(Reason.SIZE_DIFFERS, detail)
