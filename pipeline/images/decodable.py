"""Whether an image's pixels can be decoded: the slow, sure check behind `pipeline.verify
--full`."""

from __future__ import annotations

import io
import warnings

import simplejpeg
from PIL import Image

from pipeline.images.header import ScreenLimits, screen

_LIMITS = ScreenLimits()
_CANNOT_DECODE = "cannot be decoded"


def undecodable(data: bytes) -> str:
    """Return why an image cannot be decoded, or an empty string where it can.

    Args:
        data: The encoded image.
    """
    found = screen(data, _LIMITS)
    if isinstance(found, str):
        return found
    if found.format == "jpeg" and found.mode in ("RGB", "L"):
        try:
            pixels_HWC = simplejpeg.decode_jpeg(data, "RGB" if found.mode == "RGB" else "GRAY")
        except ValueError:
            pass  # libjpeg's word alone is too strict in places; Pillow decides
        else:
            return (
                ""
                if pixels_HWC.shape[:2] == (found.height, found.width)
                else "the header's size is not the image's"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes that the screen has let through
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                size = image.size
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return _CANNOT_DECODE
    return "" if size == (found.width, found.height) else "the header's size is not the image's"
