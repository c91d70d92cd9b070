"""Mean and deviation of a dataset's pixels, and the rest of what `pipeline.convert --stats` writes
down."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from pipeline.images.encode import DECODER_ERRORS
from pipeline.images.header import Probe


@dataclass
class PixelSums:
    """Sums over images of their pixels' means and mean squares in [0, 1], channel by channel; every
    image counts alike.

    Args:
        num_images: Images that were decoded.
        num_undecodable: Images that could not be.
        means: Sum of the images' means, RGB.
        squares: Sum of the images' mean squares, RGB.
    """

    num_images: int = 0
    num_undecodable: int = 0
    means: list[float] = field(default_factory=lambda: [0.0] * 3)
    squares: list[float] = field(default_factory=lambda: [0.0] * 3)

    def add(self, data: bytes, found: Probe) -> None:
        """Decode an image and count it."""
        pixels = _decode(data, found)
        if pixels is None:
            self.num_undecodable += 1
            return
        self.num_images += 1
        means, deviations = cv2.meanStdDev(pixels)
        mean = means.ravel() / 255
        deviation = deviations.ravel() / 255
        # The mean of squares can be summed over images; a deviation cannot.
        square = deviation**2 + mean**2
        self.means = _added(self.means, mean)
        self.squares = _added(self.squares, square)


def _added(totals: list[float], values: npt.NDArray[np.float64]) -> list[float]:
    # Python's floats: a part of a conversion keeps the sums as JSON.
    sums = []
    for total, value in zip(totals, values, strict=True):
        sums.append(total + float(value))
    return sums


def _decode(data: bytes, found: Probe) -> npt.NDArray[np.uint8] | None:
    """Return RGB pixels, or None if the image is broken."""
    if found.format == "raw":
        pixels = np.frombuffer(data, np.uint8)
        return pixels.reshape(found.height, found.width, 3)
    # Other modes, CMYK for example, are left to Pillow.
    if found.format == "jpeg" and found.mode in ("RGB", "L"):
        # It refuses what libjpeg only warns of, such as stray bytes: then Pillow decides.
        with suppress(ValueError):
            return simplejpeg.decode_jpeg(data, "RGB")
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that the screen has already let through.
            warnings.simplefilter("ignore")
            file = io.BytesIO(data)
            with Image.open(file) as image:
                colours = image.convert("RGB")
                return np.asarray(colours)
    except DECODER_ERRORS:
        return None
