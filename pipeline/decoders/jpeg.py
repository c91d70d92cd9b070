"""Decode of a JPEG no more than a box needs, with libjpeg-turbo.

simplejpeg decodes whole images. nvImageCodec, which DALI brings along, skips the inverse transform
outside of a box and stops below it; its pixels are the same, bit for bit, in about five sixths of
the time (docs/benchmarks/loaders.md).
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import numpy as np
import simplejpeg

from pipeline.decoders.base import U8, too_small
from pipeline.decoders.tuning import is_installed
from pipeline.images.jpeg_header import JPEG_END, JPEG_START, is_common

_TAIL_BYTES = 4096
"""The end of a JPEG is looked for in so many bytes: some cameras write a little behind it."""
_KEPT_SCRATCH_BYTES = 64 * 2**20
"""Scratch memory that is kept; what a larger image needs is given back after it."""
_REGION_MIN_PIXELS = 256 * 256
"""Below this an image is decoded whole: a region saves a sixth, and costs some 25 microseconds of
its own."""
_REGION_MIN_WIDTH = 2
"""A region of the leftmost column alone has other colours than that column of the whole image, if
chroma is stored at half the width: what the upsampling blends it with is not decoded."""
_REGION_MAX_SHARE = 0.95
"""A box of more than this share of the image is decoded with all of it."""


def is_whole_jpeg(image: U8) -> bool:
    """Say whether a file begins, declares itself and ends as a JPEG of the common kinds does.

    What decodes only a part of an image must ask this first: it would not notice that the rest is
    missing. And nvImageCodec ends the process on some damaged headers, all of which libjpeg-turbo's
    parser refuses. Stray bytes between segments, lossless and arithmetic coding are not common:
    parsers other than libjpeg's have not been tried on them.
    """
    if not (_has_both_ends(image) and is_common(image.data)):
        return False
    try:
        simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return False
    return True


def _has_both_ends(image: U8) -> bool:
    if image[:3].tobytes() != JPEG_START:
        return False
    # Most files end with the marker: two bytes are looked at before the tail is copied.
    if image[-2:].tobytes() == JPEG_END:
        return True
    return JPEG_END in image[-_TAIL_BYTES:].tobytes()


def read_header(image: U8, *, bottom: int, right: int) -> tuple[int, int, str] | None:
    """Return a JPEG's height, width and colours ("YCbCr", "Gray", "CMYK", ...); None if the file
    is not a JPEG.

    Raises:
        ValueError: the image is smaller than its box.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    if bottom > height or right > width:
        raise too_small(width, height)
    return height, width, colours


class JpegCutter:
    """Cut boxes out of JPEGs. Holds scratch memory: one for each thread.

    Args:
        regions: whether nvImageCodec may be used if it is installed.
    """

    def __init__(self, *, regions: bool = True) -> None:
        self._scratch = np.empty(0, dtype=np.uint8)
        self._codec: Any = None
        if regions and has_regions():
            # It writes to stderr of each damaged image; those are counted and reported here, with
            # their names.
            os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
            codec: Any = import_module("nvidia.nvimgcodec")
            self._codec = codec
            backend = codec.Backend(codec.CPU_ONLY)
            # One thread: this object belongs to one of the decoder's own threads.
            self._decoder = codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[backend],
            )
            # Boxes are in stored pixels, as the manifest counts them.
            self._as_stored = codec.DecodeParams(apply_exif_orientation=False)

    def cut(
        self, image: U8, *, top: int, left: int, height: int, width: int
    ) -> U8 | None:
        """Return the pixels of a box, uint8 RGB (height, width, 3), valid until the next call.

        Returns:
            None if Pillow must have a look: not a JPEG, damaged, or of a kind that does not become
            RGB here.

        Raises:
            ValueError: the image is smaller than its box.
        """
        bottom = top + height
        right = left + width
        header = read_header(image, bottom=bottom, right=right)
        if header is None:
            return None
        image_height, image_width, colours = header
        num_pixels = image_height * image_width
        if (
            self._codec is not None
            and colours == "YCbCr"
            and num_pixels >= _REGION_MIN_PIXELS
            and height * width <= _REGION_MAX_SHARE * num_pixels
            and width >= _REGION_MIN_WIDTH
            and _has_both_ends(image)  # with the header that was read: `is_whole_jpeg`
            and is_common(image.data)
        ):
            return self._region(image, (top, left, bottom, right))
        scratch = self._scratch_of(num_pixels * 3)
        try:
            whole_HW3 = simplejpeg.decode_jpeg(image, "RGB", buffer=scratch)
        except ValueError:
            # Damaged: Pillow has the last word, so that every decoder gives up on the same images.
            return None
        cut_HW3: U8 = whole_HW3[top:bottom, left:right]
        return cut_HW3

    def _region(self, image: U8, box: tuple[int, int, int, int]) -> U8 | None:
        stream = self._codec.CodeStream(image)
        region = stream.get_sub_code_stream(region=self._codec.Region(*box))
        cut = self._decoder.decode(region, params=self._as_stored)
        # None for a damaged image: Pillow has the last word.
        if cut is None:
            return None
        return np.asarray(cut)

    def _scratch_of(self, num_bytes: int) -> U8:
        if self._scratch.size >= num_bytes:
            return self._scratch[:num_bytes]
        scratch = np.empty(num_bytes, dtype=np.uint8)
        # One huge image must not hold its memory in every thread until the run ends.
        if num_bytes <= _KEPT_SCRATCH_BYTES:
            self._scratch = scratch
        return scratch


def has_regions() -> bool:
    """Say whether nvImageCodec is installed."""
    return is_installed("nvidia.nvimgcodec")
