"""What `--stats` says of a dataset's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.formats.table import NO_LABEL, ShardTable
from pipeline.images.pixel_sums import PixelSums


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
        names = (
            classes if classes is not None and len(classes) == len(numbers) else range(len(numbers))
        )
        quantiles = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        return {
            "num_images": count,
            "num_undecodable": sum(part.num_undecodable for part in parts),
            "mean": mean,
            "std": [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True)],
            "weights": "every image alike; RGB in [0, 1]",
            "quantiles": list(quantiles),
            **{
                name: np.quantile(values, quantiles).round().astype(int).tolist()
                for name, values in columns.items()
            },
            "num_unlabelled": int((labels == NO_LABEL).sum()),
            "class_counts": {
                str(name): int(number) for name, number in zip(names, numbers, strict=True)
            },
        }
