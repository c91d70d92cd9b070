"""What `--stats` says of a dataset's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.formats.table import NO_LABEL, ShardTable
from pipeline.images.pixel_sums import PixelSums

_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


class DatasetStatistics:
    """Collects what the shards' tables say, shard by shard in order."""

    def __init__(self) -> None:
        self._columns: dict[str, list[npt.NDArray[Any]]] = {
            "width": [],
            "height": [],
            "bytes": [],
            "label": [],
        }

    def add(self, table: ShardTable) -> None:
        """Count a shard."""
        columns: tuple[npt.NDArray[Any], ...] = (
            table.widths,
            table.heights,
            table.sizes,
            table.labels,
        )
        for values, column in zip(
            self._columns.values(),
            columns,
            strict=True,
        ):
            values.append(column)

    def describe(
        self, sums: Iterable[PixelSums], *, classes: list[str] | None
    ) -> dict[str, Any]:
        """Return the content of `stats.json`.

        Args:
            sums: The shards' pixels, in order: the last digits depend on it.
            classes: Class names by label.
        """
        pixels = list(sums)
        count = sum(part.num_images for part in pixels)
        mean = []
        std = []
        for channel in range(3):
            # fsum: the result must not depend on how many images a shard has.
            total = math.fsum(part.means[channel] for part in pixels)
            total_squares = math.fsum(part.squares[channel] for part in pixels)
            channel_mean = total / max(1, count)
            variance = total_squares / max(1, count) - channel_mean * channel_mean
            mean.append(channel_mean)
            std.append(math.sqrt(max(0.0, variance)))

        columns = {
            name: np.concatenate(values) for name, values in self._columns.items()
        }
        labels = columns.pop("label")
        quantiles = {
            name: np.quantile(values, _QUANTILES).round().astype(int).tolist()
            for name, values in columns.items()
        }
        return {
            "num_images": count,
            "num_undecodable": sum(part.num_undecodable for part in pixels),
            "mean": mean,
            "std": std,
            "weights": "every image alike; RGB in [0, 1]",
            "quantiles": list(_QUANTILES),
            **quantiles,
            "num_unlabelled": int((labels == NO_LABEL).sum()),
            "class_counts": _class_counts(labels, classes),
        }


def _class_counts(
    labels: npt.NDArray[Any], classes: list[str] | None
) -> dict[str, int]:
    """Return images per class, by name if all classes have one and by number otherwise."""
    counts = np.bincount(labels[labels != NO_LABEL], minlength=len(classes or []))
    has_names = classes is not None and len(classes) == len(counts)
    names = classes if classes is not None and has_names else range(len(counts))
    return {
        str(name): int(count)
        for name, count in zip(
            names,
            counts,
            strict=True,
        )
    }
