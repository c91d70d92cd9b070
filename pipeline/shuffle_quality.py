"""How good a shuffle is: `python -m pipeline.shuffle_quality --num-shards 1000 --shard-size 1281`.

Compares the order of lanes and windows with a full shuffle of the same samples, in the worst case:
samples stored sorted, so that a sample's position in storage stands for its class.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.shuffle_quality")

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.bench.command import BenchArguments, Outcome, report, run_bench
from pipeline.config import OrderConfig
from pipeline.console import Progress
from pipeline.errors import ConfigError
from pipeline.options import BatchSize, CountOrOff, Lanes, Rounds, Seed
from pipeline.sampling.order import EpochOrder
from pipeline.sampling.philox import I64, Purpose, permutation


@dataclass(frozen=True)
class ShuffleQuality:
    """One order against a full shuffle. Every figure is 1 for a full shuffle, up to its noise, but
    the correlation: 0.

    Attributes:
        displacement: mean distance between a sample's positions in storage and in the order.
        neighbour_correlation: correlation of the storage positions of consecutive samples.
        batch_spread: standard deviation of the storage position inside a global batch, averaged.
        batch_variance: variance over global batches of the mean storage position; above 1, batches
            differ more than by chance.
        repeated_company: how often two samples of one shard that share a global batch meet again in
            a global batch of the next epoch.
    """

    displacement: float
    neighbour_correlation: float
    batch_spread: float
    batch_variance: float
    repeated_company: float


def measure(
    ids: I64, next_ids: I64, *, global_batch_size: int, shard_size: int
) -> ShuffleQuality:
    """Measure an epoch's order and its likeness to the next one's.

    Args:
        ids: storage positions in the order of one epoch.
        next_ids: the same of the next epoch.
        global_batch_size: samples of a batch.
        shard_size: samples of a shard; all shards are alike.
    """
    # Both as shares of the dataset, so that figures of datasets of any size compare.
    count = len(ids)
    stored = ids / count
    ordered = np.arange(count) / count
    distances = np.abs(stored - ordered)
    behind = stored[1:]
    correlations = np.corrcoef(stored[:-1], behind)

    # The last batch may be short, and its spread would not compare with the others'.
    num_whole = count // global_batch_size
    whole = num_whole * global_batch_size
    of_whole_batches = stored[:whole]
    batches = of_whole_batches.reshape(-1, global_batch_size)
    spreads = batches.std(axis=1)
    means = batches.mean(axis=1)
    company = _repeated_company(
        ids, next_ids, global_batch_size=global_batch_size, shard_size=shard_size
    )

    # A full shuffle: the mean distance of two uniform numbers is 1/3, their variance 1/12.
    return ShuffleQuality(
        displacement=float(distances.mean() * 3),
        neighbour_correlation=float(correlations[0, 1]),
        batch_spread=float(spreads.mean() * 12**0.5),
        batch_variance=float(means.var() * 12 * global_batch_size),
        repeated_company=company,
    )


def _repeated_company(
    ids: I64, next_ids: I64, *, global_batch_size: int, shard_size: int
) -> float:
    """Chance that two samples of one shard and one batch share a batch again, over that chance in a
    full shuffle."""
    shards = ids // shard_size
    positions = np.arange(len(ids))
    batches = positions // global_batch_size
    # Sorted by batch and shard, samples of one shard that share a batch stand side by side.
    order = np.lexsort((shards, batches))
    first_of_pair = order[:-1]
    second_of_pair = order[1:]
    same_shard = shards[first_of_pair] == shards[second_of_pair]
    same_batch = batches[first_of_pair] == batches[second_of_pair]
    together = same_shard & same_batch
    # No two samples of a shard share a batch: as good as a full shuffle.
    if not together.any():
        return 1.0

    # Only neighbours are compared, not all pairs: a fair sample, and linear in the samples.
    next_batch_of = _inverse(next_ids) // global_batch_size
    first = ids[first_of_pair][together]
    second = ids[second_of_pair][together]
    again = next_batch_of[first] == next_batch_of[second]
    # In a full shuffle two samples share a batch with a chance of one in the number of batches.
    share = again.mean()
    return float(share * len(ids) / global_batch_size)


def _inverse(ids: I64) -> npt.NDArray[np.int64]:
    positions = np.empty_like(ids)
    positions[ids] = np.arange(len(ids))
    return positions


@dataclass(frozen=True)
class Arguments(BenchArguments):
    """Compare orders with a full shuffle, for a dataset of equal shards."""

    num_shards: Rounds = 1000
    """Shards."""
    shard_size: Rounds = 1281
    """Samples per shard."""
    global_batch_size: BatchSize = 4096
    """Samples of one optimizer step."""
    lanes: tuple[Lanes, ...] = (1, 16, 64, 256)
    """Numbers of lanes to compare."""
    windows: tuple[CountOrOff, ...] = (1, 4, 32, 0)
    """Windows to compare, in shards; 0 is all of a lane."""
    seed: Seed = 0
    """Key of the orders."""


def _rows(arguments: Arguments) -> list[dict[str, Any]]:
    count = arguments.num_shards * arguments.shard_size
    two_batches = 2 * arguments.global_batch_size
    if count < two_batches or arguments.global_batch_size < 2:
        raise ConfigError(
            f"shuffle_quality: {count} samples do not make two batches of "
            f"{arguments.global_batch_size}"
        )
    sizes_S = np.full(arguments.num_shards, arguments.shard_size)

    def quality(ids_of_epoch: Callable[[int], I64]) -> dict[str, Any]:
        ids = ids_of_epoch(0)
        next_ids = ids_of_epoch(1)
        measured = measure(
            ids,
            next_ids,
            global_batch_size=arguments.global_batch_size,
            shard_size=arguments.shard_size,
        )
        progress.advance(1)
        return asdict(measured)

    # Drawn like a window over everything, so that it is as random as the orders beside it.
    def full_shuffle(epoch: int) -> I64:
        return permutation(
            count, seed=arguments.seed, purpose=Purpose.WINDOW, epoch=epoch
        )

    def ordered(config: OrderConfig, epoch: int) -> I64:
        order = EpochOrder(sizes_S, config=config, seed=arguments.seed, epoch=epoch)
        positions = np.arange(count)
        return order.sample_ids(positions)

    num_lanes = len(arguments.lanes)
    num_windows = len(arguments.windows)
    num_orders = 1 + num_lanes * num_windows
    with Progress("shuffle_quality", total=num_orders, unit="orders") as progress:
        # A row of its own: it shows the noise of a shuffle of this many samples.
        rows = [{"lanes": "full", "window": "shuffle", **quality(full_shuffle)}]
        for lanes in arguments.lanes:
            for window in arguments.windows:
                config = OrderConfig(lanes=lanes, window=window)
                figures = quality(partial(ordered, config))
                rows.append({"lanes": lanes, "window": window or "all", **figures})
    return rows


def _run(arguments: Arguments) -> Outcome:
    return report(_rows(arguments), facts={"settings": asdict(arguments)})


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_bench(Arguments, _run, module="pipeline.shuffle_quality", args=args)
