"""Object storage on a bad day: the same bytes, later, and counted; or an error that says what and
where."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.dataset import open_dataset
from pipeline.errors import DataError, InfrastructureError
from pipeline.images.refused import Reason, Refused
from pipeline.reading.cache import ShardCache
from pipeline.reading.reader import ShardReader
from pipeline.storage.retry import BUDGET_VARIABLE
from tests.limits import HANG_S

pytestmark = pytest.mark.remote

BAD_DAYS = ["503", "500", "reset", "cut", "cut_reset", "slow"]


@pytest.fixture
def remote(make_dataset, s3_bucket):
    return open_dataset(make_dataset(uri=f"{s3_bucket}/crops"))


@pytest.fixture
def local_images(make_dataset, remote):
    dataset = open_dataset(make_dataset())
    reader = ShardReader(dataset)
    images, _ = reader.read(dataset.lookup(np.arange(60)))
    return [image.tobytes() for image in images]


def assert_counted(retries: int, kind: str, *, times: int) -> None:
    # HTTP clients send a GET again by themselves if a connection they kept was closed meanwhile.
    if kind == "reset":
        assert 1 <= retries <= times
    else:
        assert retries == (0 if kind == "slow" else times)


@pytest.mark.parametrize("kind", BAD_DAYS)
def test_samples_read_by_range_are_the_same_bytes_and_retries_are_counted(
    remote, local_images, through_proxy, tmp_path, kind
):
    proxy = through_proxy()
    proxy.plan(kind, times=5, match=r"\.tar", body="ranged")
    reader = ShardReader(remote, cache_dir=tmp_path)
    images, bad = reader.read(remote.lookup(np.arange(60)))
    counters = reader.counters
    reader.close()
    assert proxy.done == Counter({kind: 5})
    assert bad == {}
    assert [image.tobytes() for image in images] == local_images
    assert_counted(counters.retries, kind, times=5)


@pytest.mark.parametrize("kind", BAD_DAYS)
def test_shards_are_staged_whole_and_retries_are_counted(
    remote, through_proxy, tmp_path, kind
):
    expected = [storage.read_bytes(remote.shard_uri(shard)) for shard in range(4)]
    proxy = through_proxy()
    proxy.plan(kind, times=3, match=r"\.tar")
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    cache.need(range(4))
    cache.begin()
    cache.wait()
    cache.close()
    assert proxy.done == Counter({kind: 3})
    assert [cache.path(shard).read_bytes() for shard in range(4)] == expected
    assert_counted(cache.counters.retries, kind, times=3)
    assert cache.counters.failed_shards == 0


def test_a_bit_flipped_on_the_way_is_found_and_read_again(
    remote, local_images, through_proxy, tmp_path
):
    proxy = through_proxy()
    proxy.plan("flip", times=2, match=r"\.tar", body="ranged")
    reader = ShardReader(remote, cache_dir=tmp_path)
    images, bad = reader.read(remote.lookup(np.arange(60)))
    assert proxy.done == Counter(flip=2)
    assert bad == {}
    assert [image.tobytes() for image in images] == local_images
    assert reader.counters.refused_samples == 2
    reader.close()
    proxy.plan("flip", times=2, match="000003.tar")
    cache = ShardCache(remote, folder=tmp_path / "other", max_bytes=2**30)
    cache.need([3])
    cache.begin()
    cache.wait()
    cache.close()
    assert proxy.done == Counter(flip=4)
    assert cache.counters.refused_shards == 2
    assert cache.staged(3)


def test_a_bit_that_is_always_flipped_ends_as_a_bad_sample(
    remote, through_proxy, tmp_path, monkeypatch
):
    monkeypatch.setenv(BUDGET_VARIABLE, "1")
    proxy = through_proxy()
    proxy.plan("flip", times=1000, match="000001.tar")
    reader = ShardReader(remote, cache_dir=tmp_path)
    reader.prepare([1])
    _, bad = reader.read(remote.lookup(np.arange(10, 16)))
    reader._cache.wait()
    assert bad == dict.fromkeys((3, 4, 5), Refused(Reason.HASH_DIFFERS))
    assert reader._cache.staged(1) is None
    assert reader.counters.failed_shards == 1
    reader.close()


@pytest.mark.parametrize("file", ["dataset.json", "manifest.parquet"])
def test_a_bit_flipped_in_what_describes_a_dataset_never_changes_it(
    remote, through_proxy, file
):
    """Wherever the bit is: it is found and read again, or it is in what nobody reads."""
    expected = remote.lookup(np.arange(60))
    proxy = through_proxy()
    for number in range(24):
        proxy.plan("flip", times=1, match=file, at=number / 24)
        dataset = open_dataset(remote.uri)
        rows = dataset.lookup(np.arange(60))
        assert proxy.done == Counter(flip=number + 1)
        assert dataset.info == remote.info
        for column in (
            "offsets_B",
            "sizes_B",
            "labels_B",
            "widths_B",
            "heights_B",
            "hashes_B",
        ):
            assert (
                getattr(rows, column).tolist() == getattr(expected, column).tolist()
            ), number


@pytest.mark.parametrize("kind", ["503", "reset", "cut"])
def test_a_store_that_stays_away_is_an_error_within_the_budget(
    remote, through_proxy, tmp_path, monkeypatch, kind
):
    monkeypatch.setenv(BUDGET_VARIABLE, "1")
    proxy = through_proxy()
    proxy.plan(kind, times=10_000, match=r"\.tar")
    reader = ShardReader(remote, cache_dir=tmp_path)
    with pytest.raises(
        InfrastructureError,
        match=r"train-000000\.tar.*after retrying for 1 s.*AWS_ENDPOINT_URL",
    ):
        reader.read(remote.lookup(np.arange(3)))
    reader.close()


def test_what_is_not_there_names_the_uri(s3_bucket, remote, monkeypatch):
    with pytest.raises(DataError, match=rf"{s3_bucket}/none"):
        open_dataset(f"{s3_bucket}/none")
    with pytest.raises(DataError, match="s3://no-such-bucket-here"):
        open_dataset("s3://no-such-bucket-here/crops")
    monkeypatch.setenv(BUDGET_VARIABLE, "0.5")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(
        InfrastructureError, match=rf"{s3_bucket}/crops.*AWS_ENDPOINT_URL"
    ):
        open_dataset(remote.uri)


def test_what_is_not_allowed_is_said_at_once(remote, through_proxy, tmp_path):
    proxy = through_proxy()
    proxy.plan("403", times=10_000)
    with pytest.raises(
        InfrastructureError,
        match=r"crops/dataset\.json.*permission denied.*credentials",
    ):
        open_dataset(remote.uri)
    assert proxy.done["403"] <= 4, "what is not allowed was asked for again and again"


STAGE = """
import sys
from pathlib import Path
from pipeline.reading.cache import ShardCache
from pipeline.dataset import open_dataset

cache = ShardCache(open_dataset(sys.argv[1]), folder=Path(sys.argv[2]), max_bytes=2**30)
cache.need(range(4))
cache.begin()
cache.wait()
"""


def test_a_process_killed_while_it_fills_the_cache_leaves_nothing_that_is_served(
    remote, fault_proxy, tmp_path
):
    fault_proxy.plan("hang", match="000002.tar")
    env = {**os.environ, "AWS_ENDPOINT_URL": fault_proxy.url}
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, remote.uri, str(tmp_path)], env=env
    )
    assert fault_proxy.hanging.wait(HANG_S)
    # The other stager is done with the other shards when only the one that hangs is left.
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    cache.need([2])
    cache.begin()
    cache.wait()
    assert cache.staged(2) is None, "fetched by two processes at once"
    leases = list((tmp_path / "shards" / "leases").iterdir())
    assert len(leases) == 2
    process.kill()
    process.wait()
    assert list(tmp_path.rglob(".partial-*"))
    fault_proxy.released.set()
    with cache._changed:
        assert cache._changed.wait_for(
            lambda: cache.staged(2) is not None, timeout=HANG_S
        )
    assert cache.path(2).read_bytes() == storage.read_bytes(remote.shard_uri(2))
    assert not list(tmp_path.rglob(".partial-*"))
    cache.close()


def test_closing_in_the_middle_of_a_download_is_no_failure(
    remote, through_proxy, tmp_path, monkeypatch
):
    """Parts that wait are cancelled, the ones under way end; no thread dies of it and nothing is
    left."""
    # Three parts a shard, all asked for at once, two under way.
    monkeypatch.setattr(
        "pipeline.reading.cache.PART_BYTES",
        max(remote.info.shards.columns["size_bytes"]) // 3 + 1,
    )
    monkeypatch.setattr("pipeline.reading.cache._PARTS_AT_ONCE", 2)
    failures: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    proxy = through_proxy()
    proxy.plan("hang", times=8, match=r"\.tar")
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    cache.need(range(4))
    cache.begin()
    assert proxy.hanging.wait(HANG_S)
    closing = threading.Thread(target=cache.close)
    closing.start()
    with cache._changed:
        assert cache._changed.wait_for(lambda: cache._closed, timeout=HANG_S)
    proxy.released.set()
    closing.join(HANG_S)
    assert not closing.is_alive()
    assert failures == []
    assert cache.counters.failed_shards == 0
    assert not list(tmp_path.rglob(".partial-*"))
    assert not list((tmp_path / "shards" / "leases").iterdir())
    whole = [
        shard for shard in range(4) if cache.staged(shard)
    ]  # one whose parts were all under way may be done
    assert len(whole) < 4
    monkeypatch.undo()  # the proxy has nothing more to say
    for shard in whole:
        assert cache.path(shard).read_bytes() == storage.read_bytes(
            remote.shard_uri(shard)
        )


@pytest.mark.parametrize("point", ["begin", "download", "commit"])
def test_sigkill_at_any_point_of_staging_is_made_good_by_the_next_process(
    remote, tmp_path, point
):
    """Killed before a byte is there, with all bytes there but unchecked, and just before the name
    is given."""
    kill = {
        "begin": "ShardCache._fetch = lambda *_: os.kill(os.getpid(), 9)",
        "download": "d = ShardCache._download; "
        "ShardCache._download = lambda *a: (d(*a), os.kill(os.getpid(), 9))",
        "commit": "from pipeline.reading import cache_folder as f; "
        "f.os.fdatasync = lambda fd: os.kill(os.getpid(), 9)",
    }[point]
    script = STAGE.replace("\ncache = ", f"\nimport os\n{kill}\ncache = ", 1)
    process = subprocess.run(
        [sys.executable, "-c", script, remote.uri, str(tmp_path)],
        timeout=HANG_S,
        check=False,
    )
    assert process.returncode == -9
    assert list(tmp_path.rglob(".partial-*"))
    cache = ShardCache(remote, folder=tmp_path, max_bytes=2**30)
    cache.need(range(4))
    cache.begin()
    cache.wait()
    for shard in range(4):
        assert cache.path(shard).read_bytes() == storage.read_bytes(
            remote.shard_uri(shard)
        )
    cache.close()
    assert not list(tmp_path.rglob(".partial-*"))
    assert not list((tmp_path / "shards" / "leases").iterdir())


READ = """
import sys
from pathlib import Path
import numpy as np
from pipeline.dataset import open_dataset
from pipeline.reading.reader import ShardReader

dataset = open_dataset(sys.argv[1])
reader = ShardReader(dataset, cache_dir=Path(sys.argv[2]), cache_bytes=2**30)
for shards in ([0], [1], [2], [3]):
    first = int(dataset.shard_starts[shards[0]])
    reader.prepare(shards)
    images, bad = reader.read(dataset.lookup(np.arange(first, first + 5)))
    assert len(images) == 5 and not bad
    if reader._cache._folder is not None:
        reader._cache.wait()
c = reader.counters
print(c.read_through, c.staged_shards, c.evicted_shards, c.no_room)
reader.close()
"""


def read_on_small_disk(
    uri: str, folder: Path, options: str, before: str = "true"
) -> list[int]:
    script = f'mount -t tmpfs -o {options} tmpfs "{folder}" && {before} && "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    probe = subprocess.run(
        ["unshare", "--mount", "true"], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own")
    command = [*prefix, sys.executable, "-c", READ, uri, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_a_full_cache_disk_is_emptied_and_then_read_around(remote, tmp_path):
    sizes = [remote.shard_bytes(shard) for shard in range(4)]
    two = f"size={(sizes[0] + sizes[1]) // 1024 + 24}k"
    through, staged, evicted, no_room = read_on_small_disk(remote.uri, tmp_path, two)
    assert (staged, no_room) == (4, 0)
    assert (
        5 <= through <= 20
    )  # the first shard's for certain; a later one may be staged before it is read
    assert evicted >= 2
    through, staged, evicted, no_room = read_on_small_disk(
        remote.uri, tmp_path, "size=24k"
    )
    assert (through, staged, evicted) == (20, 0, 0)
    assert no_room >= 4


def test_a_read_only_cache_disk_is_read_around(remote, tmp_path):
    assert read_on_small_disk(remote.uri, tmp_path, "ro") == [20, 0, 0, 0]
