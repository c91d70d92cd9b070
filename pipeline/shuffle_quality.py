"""How good a shuffle is: `python -m pipeline.shuffle_quality --num-shards 1000 --shard-size 1281`.

Compares the order of lanes and windows with a full shuffle of the same samples, in the worst case:
samples stored sorted, so that a sample's place in storage stands for its class.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.shuffle_quality")

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import OrderConfig
from pipeline.console import run_command, say_json
from pipeline.errors import ConfigError
from pipeline.sampling.order import EpochOrder
from pipeline.sampling.philox import I64, Purpose, permutation


@dataclass(frozen=True)
class ShuffleQuality:
    """One order against a full shuffle. Every figure is 1 for a full shuffle, up to its noise, but
    the correlation: 0.

    Attributes:
        displacement: mean distance between a sample's place in storage and in the order.
        neighbour_correlation: correlation of the storage places of samples that follow each other.
        batch_spread: standard deviation of the storage place inside a global batch, averaged.
        batch_variance: variance over global batches of the mean storage place; above 1, batches
            differ more than chance would have it.
        repeated_company: how often two samples of one shard that share a global batch meet again in
            a global batch of the next epoch.
    """

    displacement: float
    neighbour_correlation: float
    batch_spread: float
    batch_variance: float
    repeated_company: float


def measure(ids: I64, next_ids: I64, *, global_batch_size: int, shard_size: int) -> ShuffleQuality:
    """Measure an epoch's order and its likeness to the next one's.

    Args:
        ids: storage places in the order of one epoch.
        next_ids: the same of the next epoch.
        global_batch_size: samples of a batch.
        shard_size: samples of a shard; all shards are alike.
    """
    count = len(ids)
    places = ids / count
    batches = places[: count // global_batch_size * global_batch_size].reshape(
        -1, global_batch_size
    )
    # A full shuffle: mean distance of two uniform places is 1/3, their variance 1/12.
    return ShuffleQuality(
        displacement=float(np.abs(places - np.arange(count) / count).mean() * 3),
        neighbour_correlation=float(np.corrcoef(places[:-1], places[1:])[0, 1]),
        batch_spread=float(batches.std(axis=1).mean() * 12**0.5),
        batch_variance=float(batches.mean(axis=1).var() * 12 * global_batch_size),
        repeated_company=_repeated_company(
            ids, next_ids, global_batch_size=global_batch_size, shard_size=shard_size
        ),
    )


def _repeated_company(ids: I64, next_ids: I64, *, global_batch_size: int, shard_size: int) -> float:
    """Chance that two samples of one shard and one batch share a batch again, over that chance in a
    full shuffle."""
    batch_of = _inverse(next_ids) // global_batch_size
    # Sorted by batch and shard, samples of one shard that share a batch stand side by side.
    order = np.lexsort((ids // shard_size, np.arange(len(ids)) // global_batch_size))
    first, second = ids[order[:-1]], ids[order[1:]]
    together = first // shard_size == second // shard_size
    together &= order[:-1] // global_batch_size == order[1:] // global_batch_size
    if not together.any():
        return 1.0
    again = batch_of[first[together]] == batch_of[second[together]]
    return float(again.mean() * len(ids) / global_batch_size)


def _inverse(ids: I64) -> npt.NDArray[np.int64]:
    places = np.empty_like(ids)
    places[ids] = np.arange(len(ids))
    return places


@dataclass(frozen=True)
class Arguments:
    """Compare orders with a full shuffle, for a dataset of equal shards."""

    num_shards: int = 1000
    """Shards."""
    shard_size: int = 1281
    """Samples in each."""
    global_batch_size: int = 4096
    """Samples of one optimizer step."""
    lanes: tuple[int, ...] = (1, 16, 64, 256)
    """Numbers of lanes to compare."""
    windows: tuple[int, ...] = (1, 4, 32, 0)
    """Windows to compare, in shards; 0 is all of a lane."""
    seed: int = 0
    """Key of the orders."""
    json: bool = False
    """Write JSON to stdout instead of a table."""


def _rows(arguments: Arguments) -> list[dict[str, Any]]:
    count = arguments.num_shards * arguments.shard_size
    if count < 2 * arguments.global_batch_size or arguments.global_batch_size < 2:
        raise ConfigError(
            f"shuffle_quality: {count} samples do not make two batches of "
            f"{arguments.global_batch_size}"
        )
    sizes_S = np.full(arguments.num_shards, arguments.shard_size)

    def quality(ids: I64, next_ids: I64) -> dict[str, Any]:
        measured = measure(
            ids,
            next_ids,
            global_batch_size=arguments.global_batch_size,
            shard_size=arguments.shard_size,
        )
        return asdict(measured)

    full = [
        permutation(count, seed=arguments.seed, purpose=Purpose.WINDOW, epoch=epoch)
        for epoch in (0, 1)
    ]
    rows = [{"lanes": "full", "window": "shuffle", **quality(*full)}]
    for lanes in arguments.lanes:
        for window in arguments.windows:
            config = OrderConfig(lanes=lanes, window=window)
            epochs = [
                EpochOrder(sizes_S, config=config, seed=arguments.seed, epoch=epoch).sample_ids(
                    np.arange(count)
                )
                for epoch in (0, 1)
            ]
            rows.append({"lanes": lanes, "window": window or "all", **quality(*epochs)})
    return rows


def _run(arguments: Arguments) -> int:
    rows = _rows(arguments)
    if arguments.json:
        say_json({"settings": asdict(arguments), "orders": rows})
        return 0
    sys.stdout.write("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|\n")
    for row in rows:
        cells = (
            f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()
        )
        sys.stdout.write("| " + " | ".join(cells) + " |\n")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(
        _run,
        Arguments,
        args,
        module="pipeline.shuffle_quality",
        interrupted="shuffle_quality: stopped.",
    )
