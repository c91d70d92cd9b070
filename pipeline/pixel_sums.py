"""Mean and deviation of a dataset's pixels, and the rest of what `pipeline.convert --stats` writes down."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from pipeline.encode import DECODER_ERRORS
from pipeline.screen import Probe
from pipeline.shard_table import NO_LABEL, ShardTable


@dataclass
class PixelSums:
    """Sums over images of their pixels' means and mean squares in [0, 1], channel by channel; every image counts alike.

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
        mean, deviation = (values.ravel() / 255 for values in cv2.meanStdDev(pixels))
        self.num_images += 1
        self.means = [total + float(value) for total, value in zip(self.means, mean, strict=True)]
        square = deviation**2 + mean**2
        self.squares = [total + float(value) for total, value in zip(self.squares, square, strict=True)]


def _decode(data: bytes, found: Probe) -> npt.NDArray[np.uint8] | None:
    """Return RGB pixels, or nothing where the image is broken."""
    if found.format == "raw":
        return np.frombuffer(data, np.uint8).reshape(found.height, found.width, 3)
    try:
        if found.format == "jpeg" and found.mode in ("RGB", "L"):
            return simplejpeg.decode_jpeg(data, "RGB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that the screen has already let through
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
    except DECODER_ERRORS:
        return None


class DatasetStatistics:
    """Collects what the shards' tables say, shard by shard in order."""

    def __init__(self) -> None:
        self._columns: dict[str, list[npt.NDArray[Any]]] = {"width": [], "height": [], "bytes": [], "label": []}

    def add(self, table: ShardTable) -> None:
        """Count a shard."""
        columns: tuple[npt.NDArray[Any], ...] = (table.widths, table.heights, table.sizes, table.labels)
        for values, column in zip(self._columns.values(), columns, strict=True):
            values.append(column)

    def describe(self, sums: Iterable[PixelSums], *, classes: list[str] | None) -> dict[str, Any]:
        """Return the content of `stats.json`.

        Args:
            sums: The shards' pixels, in order: the last digits depend on it.
            classes: Class names by label.
        """
        parts = list(sums)
        count = sum(part.num_images for part in parts)
        mean = [math.fsum(part.means[c] for part in parts) / max(1, count) for c in range(3)]
        square = [math.fsum(part.squares[c] for part in parts) / max(1, count) for c in range(3)]
        columns = {name: np.concatenate(values) for name, values in self._columns.items()}
        labels = columns.pop("label")
        numbers = np.bincount(labels[labels != NO_LABEL], minlength=len(classes or []))
        names = classes if classes is not None and len(classes) == len(numbers) else range(len(numbers))
        quantiles = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        return {
            "num_images": count,
            "num_undecodable": sum(part.num_undecodable for part in parts),
            "mean": mean,
            "std": [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True)],
            "weights": "every image alike; RGB in [0, 1]",
            "quantiles": list(quantiles),
            **{name: np.quantile(values, quantiles).round().astype(int).tolist() for name, values in columns.items()},
            "num_unlabelled": int((labels == NO_LABEL).sum()),
            "class_counts": {str(name): int(number) for name, number in zip(names, numbers, strict=True)},
        }
