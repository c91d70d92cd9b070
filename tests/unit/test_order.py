"""The order's promises, for any sizes: each sample once, the same batches at every world size, from
any place."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.config import OrderConfig
from pipeline.errors import ConfigError
from pipeline.sampling.order import Cursor, EpochOrder, Order

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
orders = st.builds(OrderConfig, lanes=st.integers(1, 20), window=st.integers(0, 5))


def first_shares(sizes_S, config, *, world, batch, batches, cursor=Cursor(), seed=5):  # noqa: B008
    """Read some global batches on every rank: a list per batch of the ranks' shares."""
    ranks = [
        Order(
            np.array(sizes_S),
            config=config,
            seed=seed,
            global_batch_size=batch,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]
    streams = [order.rank_batches(cursor) for order in ranks]
    return [[next(stream) for stream in streams] for _ in range(batches)]


@given(sizes, orders, st.integers(0, 2**40), st.integers(0, 5))
def test_every_sample_once_an_epoch(sizes_S, config, seed, epoch):
    order = EpochOrder(np.array(sizes_S), config=config, seed=seed, epoch=epoch)
    total = sum(sizes_S)
    ids = order.sample_ids(np.arange(total))
    assert sorted(ids.tolist()) == list(range(total))


@given(sizes, orders, st.data())
def test_any_position_can_be_asked_alone(sizes_S, config, data):
    total = sum(sizes_S)
    whole = EpochOrder(np.array(sizes_S), config=config, seed=1, epoch=2).sample_ids(
        np.arange(total)
    )
    positions = np.array(
        data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=20))
    )
    alone = EpochOrder(np.array(sizes_S), config=config, seed=1, epoch=2)
    assert alone.sample_ids(positions).tolist() == whole[positions].tolist()


@given(
    sizes,
    orders,
    st.sampled_from(["fill", "drop"]),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_batches_do_not_depend_on_the_world_size(
    sizes_S, config, remainder, world, micro, accumulation
):
    config = config.model_copy(update={"remainder": remainder})
    batch = world * micro * accumulation
    assume(remainder == "fill" or sum(sizes_S) >= batch)
    alone = first_shares(sizes_S, config, world=1, batch=batch, batches=5)
    shared = first_shares(sizes_S, config, world=world, batch=batch, batches=5)
    for [one], ranks in zip(alone, shared, strict=True):
        pairs = sorted(
            zip(
                one.epochs_B.tolist(),
                one.positions_B.tolist(),
                one.sample_ids_B.tolist(),
                strict=True,
            )
        )
        union = [
            item
            for share in ranks
            for item in zip(
                share.epochs_B.tolist(),
                share.positions_B.tolist(),
                share.sample_ids_B.tolist(),
                strict=True,
            )
        ]
        assert sorted(union) == pairs
        assert {len(share.sample_ids_B) for share in ranks} == {micro * accumulation}
        assert {share.end for share in ranks} == {one.end}


@given(sizes, orders, st.integers(1, 4), st.integers(1, 8))
def test_fill_covers_whole_epochs(sizes_S, config, world, per_rank):
    batch, total = world * per_rank, sum(sizes_S)
    batches = math.ceil(2 * total / batch)
    shares = first_shares(sizes_S, config, world=world, batch=batch, batches=batches)
    seen = [
        (e, s)
        for ranks in shares
        for share in ranks
        for e, s in zip(share.epochs_B, share.sample_ids_B, strict=True)
    ]
    for epoch in (0, 1):
        assert sorted(int(s) for e, s in seen if e == epoch) == list(range(total))


@given(sizes, orders, st.integers(1, 30))
def test_drop_leaves_out_less_than_a_batch(sizes_S, config, batch):
    total = sum(sizes_S)
    assume(total >= batch)
    config = config.model_copy(update={"remainder": "drop"})
    batches = total // batch
    shares = [
        share
        for [share] in first_shares(
            sizes_S, config, world=1, batch=batch, batches=batches + 1
        )
    ]
    seen = np.concatenate([share.sample_ids_B for share in shares[:-1]])
    assert len(set(seen.tolist())) == batches * batch > total - batch
    assert shares[-1].start == Cursor(1, 0)


@given(
    sizes,
    orders,
    st.sampled_from(["fill", "drop"]),
    st.integers(1, 12),
    st.integers(0, 30),
)
def test_resume_goes_on_exactly(sizes_S, config, remainder, batch, skipped):
    assume(remainder == "fill" or sum(sizes_S) >= batch)
    config = config.model_copy(update={"remainder": remainder})
    whole = first_shares(sizes_S, config, world=1, batch=batch, batches=skipped + 2)
    order = Order(np.array(sizes_S), config=config, seed=5, global_batch_size=batch)
    share = order.rank_batch(order.advance(Cursor(), batches=skipped))
    assert share.sample_ids_B.tolist() == whole[skipped][0].sample_ids_B.tolist()
    assert share.start == whole[skipped][0].start


@given(
    st.integers(1, 8),
    st.integers(2, 30),
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_a_rank_reads_only_its_own_shards(num_shards, size, window, world, multiple):
    lanes = world * multiple
    num_shards *= lanes
    config = OrderConfig(lanes=lanes, window=window)
    total = num_shards * size
    batch = world * 3
    for rank in range(world):
        order = Order(
            np.full(num_shards, size),
            config=config,
            seed=1,
            global_batch_size=batch,
            rank=rank,
            world_size=world,
        )
        cursor, shards = Cursor(), set()
        while cursor.epoch == 0:
            share = order.rank_batch(cursor)
            shards |= set((share.sample_ids_B[share.epochs_B == 0] // size).tolist())
            cursor = share.end
        assert len(shards) <= num_shards / world + 2 * lanes / world, (total, rank)


def test_seeds_and_epochs_give_other_orders():
    def ids(seed: int, epoch: int) -> list[int]:
        order = EpochOrder(
            np.full(10, 20), config=OrderConfig(lanes=4), seed=seed, epoch=epoch
        )
        return order.sample_ids(np.arange(200)).tolist()

    assert ids(0, 0) == ids(0, 0)
    assert ids(0, 0) != ids(0, 1)
    assert ids(0, 0) != ids(1, 0)


@given(sizes, orders, st.integers(1, 40))
def test_shards_ahead_hold_what_will_be_read(sizes_S, config, count):
    order = EpochOrder(np.array(sizes_S), config=config, seed=3, epoch=0)
    positions = np.arange(min(count, sum(sizes_S)))
    starts = np.concatenate([[0], np.cumsum(sizes_S)])
    read = np.searchsorted(starts, order.sample_ids(positions), side="right") - 1
    ahead = order.shards_ahead(positions).tolist()
    assert set(read.tolist()) <= set(ahead)
    assert len(ahead) == len(set(ahead))


def test_memory_is_a_window_a_lane_not_the_epoch():
    config = OrderConfig(lanes=8, window=2)
    order = EpochOrder(np.full(800, 50), config=config, seed=0, epoch=0)
    for start in range(0, 40_000, 400):
        order.sample_ids(np.arange(start, start + 400))
    assert len(order._runs) <= 16
    assert sum(len(run) for run in order._runs.values()) <= 16 * 2 * 50


def test_numbers_that_cannot_work_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="10 does not divide over 3 ranks"):
        Order(
            np.array([5]),
            config=OrderConfig(),
            seed=0,
            global_batch_size=10,
            world_size=3,
        )
    with pytest.raises(ConfigError, match="no samples"):
        Order(np.array([0]), config=OrderConfig(), seed=0, global_batch_size=1)
    with pytest.raises(
        ConfigError, match="holds 5 samples, fewer than one global batch of 10"
    ):
        Order(
            np.array([5]),
            config=OrderConfig(remainder="drop"),
            seed=0,
            global_batch_size=10,
        )


def test_the_order_of_a_published_version_never_changes():
    """A golden order: a change here changes what every resumed run sees."""
    order = EpochOrder(
        np.array([3, 5, 4]), config=OrderConfig(lanes=3, window=2), seed=42, epoch=1
    )
    assert order.sample_ids(np.arange(12)).tolist() == GOLDEN


GOLDEN = [2, 11, 4, 0, 3, 7, 8, 10, 6, 1, 9, 5]
