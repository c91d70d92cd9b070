"""The order of samples: a pure function of (shard sizes, seed, epoch, position).

Each epoch the shards are permuted and laid end to end; that line of samples is cut into `lanes`
equal pieces; inside a lane, runs of `window` shards are permuted sample by sample. Position p of an
epoch is sample p // lanes of lane p % lanes. A rank takes the positions that are congruent to it
modulo the world size: if the world size divides the lanes it reads only its own lanes, and what
a global batch holds never depends on the number of ranks.

Everything is addressable: the sample at any position costs one window, not a walk from the start.

Shapes: B samples, S shards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.config import OrderConfig
from pipeline.errors import ConfigError
from pipeline.sampling.philox import I64, Purpose, permutation


@dataclass(frozen=True)
class Cursor:
    """A place in the endless stream of epochs: the next position to be read."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class RankBatch:
    """What one rank reads of one global batch, in the order it reads it.

    Attributes:
        epochs_B, positions_B, sample_ids_B: int64 arrays, one entry a sample.
        start: beginning of the global batch.
        end: beginning of the next one.
    """

    epochs_B: I64
    positions_B: I64
    sample_ids_B: I64
    start: Cursor
    end: Cursor


class EpochOrder:
    """The order of one epoch.

    Args:
        shard_sizes_S: samples in each shard.
        config: lanes and window.
        seed: key of the run.
        epoch: which epoch.
    """

    def __init__(
        self, shard_sizes_S: I64, *, config: OrderConfig, seed: int, epoch: int
    ) -> None:
        self._seed = seed
        self._epoch = epoch
        self._lanes = config.lanes
        num_shards = len(shard_sizes_S)
        # A window of 0 spans all shards.
        self._window = config.window or max(num_shards, 1)
        self._line_shards_S = permutation(
            num_shards,
            seed=seed,
            purpose=Purpose.SHARDS,
            epoch=epoch,
        )
        line_sizes_S = shard_sizes_S[self._line_shards_S]
        self._line_starts = _starts_of(line_sizes_S)
        self._shard_starts = _starts_of(shard_sizes_S)
        self.num_samples = int(self._line_starts[-1])
        # One permuted run a lane is in use at a time; the second is the one a batch reaches into.
        self._runs: OrderedDict[int, I64] = OrderedDict()
        self._max_runs = 2 * self._lanes

    def sample_ids(self, positions_B: I64) -> I64:
        """Look up which samples stand at the given positions.

        Args:
            positions_B: positions in [0, num_samples), any order.

        Returns:
            int64 sample ids of shape (B,).
        """
        positions_B = np.asarray(positions_B, dtype=np.int64)
        starts_B, ends_B, line_B = self._runs_of(positions_B)
        permuted_B = np.empty_like(line_B)
        # Equal starts are equal runs: a run is a contiguous, non-empty piece of the line.
        by_run = np.argsort(starts_B, kind="stable")
        sorted_starts_B = starts_B[by_run]
        # No start is -1, so the first and the last position are edges too.
        steps = np.diff(sorted_starts_B, prepend=-1, append=-1)
        edges = np.flatnonzero(steps)
        for begin, finish in pairwise(edges.tolist()):
            members = by_run[begin:finish]
            first = members[0]
            start = int(starts_B[first])
            end = int(ends_B[first])
            permutation_R = self._run_permutation(start, end - start)
            inside_run = line_B[members] - start
            permuted_B[members] = start + permutation_R[inside_run]

        # From the place on the line back to the dataset's own numbering of samples.
        after_B = np.searchsorted(self._line_starts, permuted_B, side="right")
        on_line_B = after_B - 1
        inside_shard_B = permuted_B - self._line_starts[on_line_B]
        shards_B = self._line_shards_S[on_line_B]
        shard_starts_B = self._shard_starts[shards_B]
        return shard_starts_B + inside_shard_B

    def shards_ahead(self, positions_B: I64) -> I64:
        """List the shards of the runs that hold the given positions, in the order in which the runs
        are reached.

        A run is permuted sample by sample, so all of its shards are needed as soon as it is
        entered.
        """
        positions_B = np.asarray(positions_B, dtype=np.int64)
        starts_B, ends_B, _ = self._runs_of(positions_B)
        _, firsts = np.unique(starts_B, return_index=True)
        pieces = []
        # `unique` sorts by start; the order in which runs are reached is that of the positions.
        for first in np.sort(firsts):
            start = starts_B[first]
            end = ends_B[first]
            after = np.searchsorted(self._line_starts, start, side="right")
            high = np.searchsorted(self._line_starts, end, side="left")
            piece = self._line_shards_S[after - 1 : high]
            pieces.append(piece)
        if not pieces:
            return np.zeros(0, dtype=np.int64)
        shards = np.concatenate(pieces)
        # Each shard once, in the order in which it is first met.
        _, firsts = np.unique(shards, return_index=True)
        return shards[np.sort(firsts)]

    def _runs_of(self, positions_B: I64) -> tuple[I64, I64, I64]:
        """Find the run of each position: its start and end on the line, and the position's own
        index on the line before permuting."""
        # The first `extra` lanes are one sample longer than the others.
        lanes_B = positions_B % self._lanes
        base, extra = divmod(self.num_samples, self._lanes)
        longer_before_B = np.minimum(lanes_B, extra)
        is_longer_B = lanes_B < extra
        lane_starts_B = lanes_B * base + longer_before_B
        lane_ends_B = lane_starts_B + base + is_longer_B
        inside_lane_B = positions_B // self._lanes
        line_B = lane_starts_B + inside_lane_B

        # A run is `window` shards, counted from the shard that the lane begins in.
        after_B = np.searchsorted(self._line_starts, line_B, side="right")
        after_first_B = np.searchsorted(self._line_starts, lane_starts_B, side="right")
        first_B = after_first_B - 1
        windows_before_B = (after_B - after_first_B) // self._window
        run_first_B = first_B + windows_before_B * self._window
        num_shards = len(self._line_starts) - 1
        run_last_B = np.minimum(run_first_B + self._window, num_shards)

        # Lanes cut through shards, so a lane's first and last run are cut off at its ends.
        run_starts_B = self._line_starts[run_first_B]
        run_ends_B = self._line_starts[run_last_B]
        starts_B = np.maximum(lane_starts_B, run_starts_B)
        ends_B = np.minimum(lane_ends_B, run_ends_B)
        return starts_B, ends_B, line_B

    def _run_permutation(self, start: int, count: int) -> I64:
        run = self._runs.get(start)
        if run is None:
            # Named by its start on the line: two runs of an epoch never start at one sample.
            run = permutation(
                count,
                seed=self._seed,
                purpose=Purpose.WINDOW,
                epoch=self._epoch,
                stream=start,
            )
            self._runs[start] = run
            while len(self._runs) > self._max_runs:
                self._runs.popitem(last=False)
        else:
            self._runs.move_to_end(start)
        return run


def _starts_of(sizes_S: I64) -> I64:
    """Return the first sample of each shard, and the number of all samples behind the last."""
    ends_S = np.cumsum(sizes_S)
    bounds = np.concatenate([[0], ends_S])
    # Whatever type the sizes have: places are int64 throughout.
    return bounds.astype(np.int64)


class Order:
    """The endless stream of global batches, and one rank's share of each.

    Args:
        shard_sizes_S: samples in each shard.
        config: lanes, window and what happens to the remainder.
        seed: key of the run.
        global_batch_size: images of one optimizer step over all ranks.
        rank: this rank, in [0, world_size).
        world_size: ranks that share a global batch; must divide it.

    Raises:
        ConfigError: the sizes do not fit together.
    """

    def __init__(
        self,
        shard_sizes_S: I64,
        *,
        config: OrderConfig,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._shard_sizes_S = np.asarray(shard_sizes_S, dtype=np.int64)
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.global_batch_size = global_batch_size
        self.lanes = config.lanes
        self.num_samples = int(self._shard_sizes_S.sum())
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()
        if global_batch_size % world_size:
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} does not divide over {world_size} "
                f"ranks: use a multiple of {world_size}"
            )
        if self.num_samples == 0:
            raise ConfigError("the dataset holds no samples")
        if config.remainder == "drop" and self.num_samples < global_batch_size:
            raise ConfigError(
                f"the dataset holds {self.num_samples} samples, fewer than one global batch of "
                f"{global_batch_size}, and order.remainder is 'drop': use 'fill' or a smaller "
                "train.global_batch_size"
            )

    @property
    def steps_per_epoch(self) -> float:
        """Global batches per epoch: whole with `drop`, a fraction with `fill`."""
        if self._config.remainder == "drop":
            whole = self.num_samples // self.global_batch_size
            return float(whole)
        return self.num_samples / self.global_batch_size

    def rank_batch(self, cursor: Cursor) -> RankBatch:
        """Compute this rank's part of the global batch that begins at a cursor."""
        start = self._settle(cursor)
        offsets = np.arange(self.global_batch_size, dtype=np.int64) + start.position
        if self._config.remainder == "drop":
            positions_B = offsets[offsets % self._world_size == self._rank]
            epochs_B = np.full_like(positions_B, start.epoch)
        else:
            # Counted from the run's first sample, so that a batch that spans two epochs is shared
            # out evenly too.
            absolute = offsets + start.epoch * self.num_samples
            mine_B = absolute[absolute % self._world_size == self._rank]
            epochs_B, positions_B = np.divmod(mine_B, self.num_samples)
        sample_ids_B = np.empty_like(positions_B)
        for epoch in np.unique(epochs_B):
            of_epoch = epochs_B == epoch
            sample_ids_B[of_epoch] = self.epoch(int(epoch)).sample_ids(
                positions_B[of_epoch]
            )
        # Settled, so that `end` of one batch is exactly `start` of the next, also in a checkpoint.
        end = self._settle(self.advance(start, batches=1))
        return RankBatch(epochs_B, positions_B, sample_ids_B, start, end)

    def rank_batches(self, cursor: Cursor) -> Iterator[RankBatch]:
        """Iterate over this rank's part of each global batch from a cursor on, without end."""
        while True:
            rank_batch = self.rank_batch(cursor)
            yield rank_batch
            cursor = rank_batch.end

    def advance(self, cursor: Cursor, *, batches: int) -> Cursor:
        """Move a cursor by whole global batches, in constant time."""
        cursor = self._settle(cursor)
        num_samples = batches * self.global_batch_size
        if self._config.remainder == "fill":
            # Counted from the run's first sample: epochs follow one another without a gap.
            before = cursor.epoch * self.num_samples
            absolute = before + cursor.position + num_samples
            epoch, position = divmod(absolute, self.num_samples)
            return Cursor(epoch, position)
        # With `drop` an epoch ends before its last samples, so batches are counted, not samples.
        left = (self.num_samples - cursor.position) // self.global_batch_size
        if batches < left:
            position = cursor.position + num_samples
            return Cursor(cursor.epoch, position)
        per_epoch = self.num_samples // self.global_batch_size
        epochs, rest = divmod(batches - left, per_epoch)
        epoch = cursor.epoch + 1 + epochs
        position = rest * self.global_batch_size
        return Cursor(epoch, position)

    def epoch(self, epoch: int) -> EpochOrder:
        """Give the order of one epoch; the two in use are kept."""
        if epoch not in self._epochs:
            self._epochs[epoch] = EpochOrder(
                self._shard_sizes_S,
                config=self._config,
                seed=self._seed,
                epoch=epoch,
            )
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _settle(self, cursor: Cursor) -> Cursor:
        """Carry a cursor that cannot start a batch over to the next epoch."""
        # With `fill` a batch may reach into the next epoch: one sample is enough to start it.
        is_whole = self._config.remainder == "drop"
        needed = self.global_batch_size if is_whole else 1
        if cursor.position + needed <= self.num_samples:
            return cursor
        past = 0
        if not is_whole:
            past = cursor.position - self.num_samples
        next_epoch = cursor.epoch + 1
        return Cursor(next_epoch, past)
