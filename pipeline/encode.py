"""Smaller copies of images: what `pipeline.convert --resize` stores."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageCms, ImageOps

from pipeline.screen import Probe

CANNOT_DECODE = "cannot be decoded"
NEEDS_RESIZE = "format needs --resize"
"""GIF, BMP and TIFF have no place in a WebDataset as they are."""
_PROFILE_SEARCH_BYTES = 65_536


def reencode(data: bytes, found: Probe, *, short_side: int, quality: int) -> bytes | str:
    """Return a JPEG whose shorter side is at most `short_side`, or the reason why there is none.

    Upright (EXIF applied), sRGB (an embedded profile is converted), CMYK converted, alpha dropped, first frame only,
    grey stays grey, never enlarged. Bicubic with antialiasing. A JPEG that is all this already keeps its bytes.

    Args:
        data: The encoded image.
        found: What its header says.
        short_side: Pixels.
        quality: JPEG quality, 1 to 100.
    """
    if _is_fine(data, found, short_side):
        return data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that the screen has already let through
            with Image.open(io.BytesIO(data)) as image:
                upright = ImageOps.exif_transpose(image)
                plain = _plain(upright)
                scale = short_side / min(plain.size)
                if scale < 1:
                    size = tuple(max(1, round(side * scale)) for side in plain.size)
                    plain = plain.resize((size[0], size[1]), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                plain.save(buffer, "JPEG", quality=quality)
                return buffer.getvalue()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        # Pillow has no one exception for a broken file; these are what its decoders raise.
        return CANNOT_DECODE


def _is_fine(data: bytes, found: Probe, short_side: int) -> bool:
    small = min(found.width, found.height) <= short_side
    kind = found.format == "jpeg" and found.mode in ("RGB", "L") and found.orientation == 1
    return small and kind and b"ICC_PROFILE" not in data[:_PROFILE_SEARCH_BYTES]


def _plain(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit sRGB or grey."""
    if image.mode.startswith("I"):  # 16 bits a pixel: the high byte, not Pillow's clipping
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile says nothing about the pixels
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode in ("1", "LA") else "RGB")
