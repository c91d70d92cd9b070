"""The measure itself: a full shuffle is the unit, sorted data is as far off as arithmetic says."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.shuffle_quality import Arguments, _rows, measure


def test_a_full_shuffle_measures_one():
    rng = np.random.default_rng(0)
    ids, next_ids = rng.permutation(100_000), rng.permutation(100_000)
    found = measure(ids, next_ids, global_batch_size=1000, shard_size=100)
    assert abs(found.displacement - 1) < 0.02
    assert abs(found.neighbour_correlation) < 0.02
    assert abs(found.batch_spread - 1) < 0.02
    assert 0.6 < found.batch_variance < 1.5
    assert 0.6 < found.repeated_company < 1.5


def test_no_shuffle_measures_what_arithmetic_says():
    ids = np.arange(100_000)
    found = measure(ids, ids, global_batch_size=1000, shard_size=100)
    assert found.displacement == 0
    assert found.neighbour_correlation > 0.999
    # A batch of consecutive samples covers 1% of the line; batch means vary as the places do.
    assert abs(found.batch_spread - 0.01) < 1e-4
    assert abs(found.batch_variance / 1000 - 1) < 0.01
    assert found.repeated_company == 100


def test_more_lanes_mix_better():
    rows = _rows(
        Arguments(
            num_shards=64,
            shard_size=100,
            global_batch_size=256,
            lanes=(1, 32),
            windows=(1, 0),
        )
    )
    by_order = {(row["lanes"], row["window"]): row for row in rows}
    assert by_order[(32, 1)]["batch_variance"] < by_order[(1, 1)]["batch_variance"] / 10
    assert by_order[(1, "all")]["batch_variance"] < 3


def test_too_few_samples_are_refused():
    with pytest.raises(ConfigError, match="do not make two batches"):
        _rows(Arguments(num_shards=1, shard_size=10))
