"""Shards in a real object store: the same bytes as on disk, staged only when whole and verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.cache import ShardCache, ShardReader
from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.errors import DataError, InfrastructureError
from pipeline.loader import Loader
from pipeline.manifest import open_dataset

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
    return [batch.sample_ids_B.tolist() for batch in taken], torch.cat([batch.images_BCHW for batch in taken])


def test_remote_shards_give_what_local_ones_give(remote, local, tmp_path):
    assert remote.info.fingerprint == local.info.fingerprint
    ids, images = seen(local, tmp_path)
    for _ in ("cold", "warm"):
        remote_ids, remote_images = seen(remote, tmp_path / "cache")
        assert remote_ids == ids
        assert torch.equal(remote_images, images)


def stage_all(cache, num_shards):
    cache.stage(range(num_shards))
    cache._stager.shutdown(wait=True)


def test_staged_shards_are_the_stores_bytes_and_nothing_else_is_left(remote, tmp_path):
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    stage_all(cache, remote.info.num_shards)
    cache.close()
    assert cache.counters.staged_shards == remote.info.num_shards
    for shard in range(remote.info.num_shards):
        assert cache.path(shard).read_bytes() == storage.read_bytes(remote.shard_uri(shard))
    assert not list(tmp_path.rglob("*.tmp-*"))
    reader = ShardReader(remote, cache_dir=tmp_path)
    images, bad = reader.read(remote.lookup(np.arange(60)))
    assert reader.counters.read_through == 0
    reader.close()
    assert len(images) == 60
    assert not bad


def test_a_shard_that_changed_in_the_store_is_never_served(remote, tmp_path):
    uri = remote.shard_uri(1)
    data = bytearray(storage.read_bytes(uri))
    start = int(remote.lookup(np.array([15])).offsets_B[0])
    data[start + 40] ^= 1
    storage.write_atomic(uri, bytes(data))
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    stage_all(cache, 2)
    cache.close()
    assert cache.staged(0) is not None
    assert cache.staged(1) is None
    assert cache.counters.refused_shards == 3
    reader = ShardReader(remote, cache_dir=tmp_path)
    _, bad = reader.read(remote.lookup(np.array([14, 15, 16])))
    reader.close()
    assert bad == {1: "hash mismatch"}


def test_the_budget_holds_and_a_mapped_shard_stays_readable(remote, tmp_path):
    sizes = [remote.shard_bytes(shard) for shard in range(4)]
    reader = ShardReader(remote, cache_dir=tmp_path, cache_bytes=sizes[0] + sizes[1] + sizes[2])
    assert reader._cache is not None
    stage_all(reader._cache, 1)
    rows = remote.lookup(np.arange(13))
    before, _ = reader.read(rows)
    copies = [image.tobytes() for image in before]
    other = ShardCache(remote, folder=tmp_path, max_bytes=max(sizes[1:]) + 1)
    stage_all(other, 4)
    other.close()
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
    assert held <= max(sizes[1:]) + 1
    assert other.counters.evicted_shards >= 1
    after, _ = reader.read(rows)
    assert [image.tobytes() for image in after] == copies
    reader.close()


def test_a_cache_folder_that_cannot_be_used_is_an_error_with_the_remedy(remote, tmp_path):
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
