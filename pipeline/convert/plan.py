"""What a conversion will make, settled before the first shard: its settings, order and shards.

The plan depends on the source and the settings alone: a run that was killed continues where it
stopped, and any number of workers makes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features

from pipeline.convert.settings import ConvertSettings
from pipeline.sources.listing import Listing

PLAN_VERSION = 1
"""Changes if the same settings would give other bytes: older unfinished conversions are then
refused."""
_MEMBER_OVERHEAD_BYTES = 3 * 1024
"""What a tar takes for an image beside its bytes: headers and padding of three members."""
_BYTES_PER_PIXEL = 0.25
"""Size of a photograph as JPEG at quality 90. Measured: 22 kB for 341x256 (ImageNet-like crops)."""


@dataclass(frozen=True)
class Plan:
    """Which image goes into which shard.

    Args:
        settings: What was asked for.
        listing_sha256: Identity of the source's content.
        order: Rows of the listing, in stored order.
        bounds: Shard k holds order[bounds[k]:bounds[k + 1]].
    """

    settings: ConvertSettings
    listing_sha256: str
    order: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]

    @property
    def num_shards(self) -> int:
        """Return how many shards there will be."""
        return len(self.bounds) - 1

    def shard_stem(self, shard: int) -> str:
        """Return a shard's name without its extension."""
        return f"{self.settings.split}-{shard:06d}"

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a later run to go on with this one."""
        return {
            "tool": "pipeline.convert",
            "plan_version": PLAN_VERSION,
            "settings": self.settings.describe(),
            "listing_sha256": self.listing_sha256,
            "num_images": len(self.order),
            "num_shards": self.num_shards,
            "versions": shaping_versions(self.settings),
        }

    def to_json(self) -> bytes:
        """Return the plan file's bytes."""
        return json.dumps(self.describe(), indent=1).encode() + b"\n"

    def identity(self) -> str:
        """Return a hash of `describe`, which the record of every finished shard carries."""
        return hashlib.sha256(self.to_json()).hexdigest()


def shaping_versions(settings: ConvertSettings) -> dict[str, str]:
    """Return the versions that the stored bytes depend on; empty if images are stored as they
    are."""
    if not (settings.resizes or settings.turns) and settings.write_mode == "jpg":
        return {}
    return {
        "pillow": PIL.__version__,
        "libjpeg-turbo": features.version("libjpeg_turbo")
        or features.version("jpg")
        or "?",
    }


def tool_version() -> str:
    """Return this program's version."""
    try:
        return metadata.version("maelstrom")
    except metadata.PackageNotFoundError:
        return "0"


def make_plan(listing: Listing, settings: ConvertSettings) -> Plan:
    """Order the images and cut them into shards.

    A dataset keeps its order, and its shards unless `samples_per_shard` is given: with the same
    bytes, the result has the same fingerprint.
    """
    seed = settings.shuffle_seed
    shards = listing.bounds
    runs = listing.runs
    if runs is not None and seed is not None:
        order = _order_of_runs(runs, seed)
    else:
        order = _order(len(listing), seed if shards is None else None)
    if settings.limit is not None:
        order = order[: settings.limit]

    if shards is not None and settings.samples_per_shard is None:
        # A limit may cut through a shard and leaves those behind it empty: unique drops them.
        bounds = np.unique(np.minimum(shards, len(order)))
    else:
        bounds = _bounds(listing.sizes[order], settings)
    # After the cut: an image may only move inside its shard, so that a shard reads few runs.
    if runs is not None and seed is not None:
        order = _shuffle_shards(
            order,
            bounds,
            seed,
        )
    return Plan(
        settings,
        listing.digest(),
        order,
        bounds,
    )


def _order(count: int, seed: int | None) -> npt.NDArray[np.int64]:
    """Return a permutation of `count` rows; no seed leaves them as they are."""
    if seed is None:
        return np.arange(count, dtype=np.int64)
    # Philox's raw words are fixed for all time; numpy's own permutation may change with its
    # version.
    words = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def _order_of_runs(runs: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Shuffle runs of images that are read together; inside a run nothing moves."""
    shuffled = _order(len(runs) - 1, seed).tolist()
    rows_by_run = [np.arange(runs[run], runs[run + 1]) for run in shuffled]
    return np.concatenate(rows_by_run).astype(np.int64)


def _shuffle_shards(
    order: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.int64]:
    """Shuffle the images of each shard in itself."""
    # The second word of the key makes another stream than that of the runs.
    words = np.random.Philox(key=[seed, 1]).random_raw(len(order))
    shard_of_row = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return order[np.lexsort((words, shard_of_row))]


def _bounds(
    sizes: npt.NDArray[np.int64], settings: ConvertSettings
) -> npt.NDArray[np.int64]:
    """Return where shards begin and end: equal counts, or about equal bytes near the size asked
    for."""
    count = len(sizes)
    if settings.samples_per_shard is not None:
        starts = np.arange(
            0,
            count,
            settings.samples_per_shard,
            dtype=np.int64,
        )
        return np.append(starts, count)

    stored = _stored_sizes(sizes, settings)
    ends = np.cumsum(stored + _MEMBER_OVERHEAD_BYTES)
    total_bytes = int(ends[-1])
    # Rounded up, then divided evenly: a last shard of a few images would slow every epoch's end.
    wanted = -(-total_bytes // settings.shard_size_bytes)
    num_shards = min(count, max(1, wanted))
    targets = [total_bytes * shard // num_shards for shard in range(1, num_shards)]
    inner = (
        np.searchsorted(
            ends,
            targets,
            side="left",
        )
        + 1
    )
    bounds = np.concatenate([[0], np.minimum(inner, count), [count]])
    return np.unique(bounds).astype(np.int64)


def _stored_sizes(
    sizes: npt.NDArray[np.int64], settings: ConvertSettings
) -> npt.NDArray[np.int64]:
    """Estimate how many bytes each image will take, from the bytes that it has."""
    is_raw = settings.write_mode == "raw"
    stored = (sizes * (3 / _BYTES_PER_PIXEL)).astype(np.int64) if is_raw else sizes

    # Pixels that a photograph of 4:3 has after each limit.
    pixels: list[float] = []
    if settings.resize is not None:
        pixels.append(settings.resize**2 * 4 / 3)
    if settings.max_resolution is not None:
        pixels.append(settings.max_resolution**2 * 3 / 4)
    if not pixels:
        return stored
    bytes_per_pixel = 3 if is_raw else _BYTES_PER_PIXEL
    return np.minimum(stored, int(bytes_per_pixel * min(pixels)))
