"""Shards in a real object store: the same bytes as on disk, staged only when whole and verified."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.errors import DataError, InfrastructureError
from pipeline.images.refused import Reason, Refused
from pipeline.loader import Loader
from pipeline.reading.cache import ShardCache
from pipeline.reading.reader import ShardReader

pytestmark = pytest.mark.remote


@pytest.fixture
def remote(make_dataset, s3_bucket):
    return open_dataset(make_dataset(uri=f"{s3_bucket}/crops"))


@pytest.fixture
def local(make_dataset):
    return open_dataset(make_dataset())


def seen(dataset, cache_dir, batches=5):
    loader = Loader(
        dataset,
        ViewConfig(height=32, width=32),
        OrderConfig(lanes=4, window=2),
        LoaderConfig(decoder="turbo", num_threads=1, cache_dir=str(cache_dir)),
        seed=0,
        global_batch_size=16,
        micro_batch_size=16,
        device=torch.device("cpu"),
    )
    with loader:
        stream = iter(loader)
        taken = [next(stream) for _ in range(batches)]
    return [batch.sample_ids_B.tolist() for batch in taken], torch.cat(
        [batch.images_BCHW for batch in taken]
    )


def test_remote_shards_give_what_local_ones_give(remote, local, tmp_path):
    assert remote.info.fingerprint == local.info.fingerprint
    ids, images = seen(local, tmp_path)
    for _ in ("cold", "warm"):
        remote_ids, remote_images = seen(remote, tmp_path / "cache")
        assert remote_ids == ids
        assert torch.equal(remote_images, images)


def stage(cache, shards):
    cache.need(shards)
    cache.begin()
    cache.wait()


def names_in(folder):
    return sorted(path.name for path in folder.rglob("*.tar"))


def test_staged_shards_are_the_stores_bytes_and_nothing_else_is_left(remote, tmp_path):
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    stage(cache, range(remote.info.num_shards))
    cache.close()
    assert cache.counters.staged_shards == remote.info.num_shards
    for shard in range(remote.info.num_shards):
        assert cache.path(shard).read_bytes() == storage.read_bytes(
            remote.shard_uri(shard)
        )
    left = [
        path.name
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".tar"
    ]
    assert left == ["cache.lock"]
    reader = ShardReader(remote, cache_dir=tmp_path)
    images, bad = reader.read(remote.lookup(np.arange(60)))
    assert reader.counters.read_through == 0
    reader.close()
    assert len(images) == 60
    assert not bad


def test_shards_are_staged_in_the_order_in_which_they_are_needed(
    remote, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.reading.cache._SHARDS_AT_ONCE", 1)
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    stage(cache, [2, 0, 3, 1])
    cache.close()
    shards = sorted(range(4), key=lambda shard: cache.path(shard).stat().st_mtime_ns)
    assert shards == [2, 0, 3, 1]


def test_the_first_read_comes_before_any_staging(remote, tmp_path):
    reader = ShardReader(remote, cache_dir=tmp_path)
    reader.prepare(range(4))
    assert names_in(tmp_path) == []
    reader.read(remote.lookup(np.arange(0, 60, 10)))
    assert reader.counters.read_through == 6
    reader._cache.wait()
    assert len(names_in(tmp_path)) == 4
    reader.close()


def test_a_shard_that_changed_in_the_store_is_never_served(remote, tmp_path):
    uri = remote.shard_uri(1)
    data = bytearray(storage.read_bytes(uri))
    start = int(remote.lookup(np.array([15])).offsets_B[0])
    data[start + 40] ^= 1
    storage.write_atomic(uri, bytes(data))
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    stage(cache, [0, 1])
    cache.close()
    assert cache.staged(0) is not None
    assert cache.staged(1) is None
    assert cache.counters.refused_shards == 3
    reader = ShardReader(remote, cache_dir=tmp_path)
    _, bad = reader.read(remote.lookup(np.array([14, 15, 16])))
    reader.close()
    assert bad == {1: Refused(Reason.HASH_DIFFERS)}


def test_the_budget_holds_and_the_shard_unused_for_longest_goes(remote, tmp_path):
    sizes = [remote.shard_bytes(shard) for shard in range(4)]
    cache = ShardCache(remote, folder=tmp_path, max_bytes=sum(sizes) - 1)
    stage(cache, [0, 1, 2])
    for age_s, shard in enumerate((2, 0, 1)):
        os.utime(cache.path(shard), (1e9 - age_s, 1e9 - age_s))
    cache.need([2, 3])
    cache.wait()
    assert cache.staged(1) is None
    assert all(cache.staged(shard) for shard in (0, 2, 3))
    assert cache.counters.evicted_shards == 1
    assert (
        sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= sum(sizes) - 1
    )
    cache.close()


def test_what_a_live_reader_needs_is_never_removed(remote, tmp_path):
    """A second job with the whole budget in mind finds no room; once the first has gone, it
    does."""
    sizes = [remote.shard_bytes(shard) for shard in range(4)]
    budget = sizes[0] + sizes[1] + 1
    first = ShardReader(remote, cache_dir=tmp_path, cache_bytes=budget)
    first.prepare([0, 1])
    rows = remote.lookup(np.arange(30))
    first.read(rows)
    first._cache.wait()
    second = ShardReader(remote, cache_dir=tmp_path, cache_bytes=budget)
    second.prepare([2, 3])
    images, bad = second.read(remote.lookup(np.arange(30, 60)))
    second._cache.wait()
    assert (len(images), bad) == (30, {})
    assert second.counters.no_room >= 1
    assert second.counters.evicted_shards == 0
    assert first._cache.staged(0)
    assert first._cache.staged(1)
    before = first.counters.read_through
    first.read(rows)
    assert first.counters.read_through == before
    first.close()
    second.prepare([3, 2])  # something changed: it looks again
    second._cache.wait()
    assert second.counters.evicted_shards >= 1
    second.close()


def test_a_map_is_let_go_when_its_window_has_passed(remote, tmp_path):
    reader = ShardReader(remote, cache_dir=tmp_path)
    stage(reader._cache, [0, 1])
    reader.read(remote.lookup(np.array([0, 15])))
    assert set(reader._maps) == {0, 1}
    reader.prepare([1, 2])
    assert set(reader._maps) == {1}
    reader.close()


def test_a_copy_of_the_wrong_size_is_fetched_again(remote, tmp_path):
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    stage(cache, [0])
    cache.close()
    with cache.path(0).open("r+b") as file:
        file.truncate(1000)
    reader = ShardReader(remote, cache_dir=tmp_path)
    reader.prepare([0])
    _, bad = reader.read(remote.lookup(np.arange(5)))
    assert bad == {}
    assert reader.counters.read_through == 5
    reader._cache.wait()
    assert cache.path(0).read_bytes() == storage.read_bytes(remote.shard_uri(0))
    reader.close()


def test_a_cache_folder_that_cannot_be_used_is_an_error_with_the_remedy(
    remote, tmp_path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(InfrastructureError, match=r"loader\.cache_dir"):
        ShardCache(remote, folder=tmp_path / "file", max_bytes=2**30)


def test_a_missing_shard_is_named(remote, tmp_path):
    storage.delete(remote.shard_uri(2))
    reader = ShardReader(remote, cache_dir=tmp_path)
    first = int(remote.shard_starts[2])
    with pytest.raises(DataError, match=Path(remote.shard_name(2)).name):
        reader.read(remote.lookup(np.array([first])))
    reader.close()


def test_what_is_refused_already_is_not_read(remote, tmp_path):
    reader = ShardReader(remote, cache_dir=tmp_path)
    images, bad = reader.read(remote.lookup(np.arange(4)), skip={1, 2})
    reader.close()
    assert reader.counters.read_through == 2
    assert [bool(image.size) for image in images] == [True, False, False, True]
    assert bad == {}
