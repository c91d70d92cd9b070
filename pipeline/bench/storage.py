"""Measure reads beside plain clients."""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.bench.generated_dataset import generate_manifest
from pipeline.bench.storage_clients import (
    Job,
    loopback_store,
    plain_clients,
    read_objects,
    read_ranges,
    write_bench_dataset,
)
from pipeline.config import OrderConfig
from pipeline.console import say
from pipeline.dataset import Manifest, open_dataset
from pipeline.reading.cache import PART_BYTES, ShardCache
from pipeline.reading.reader import ShardReader
from pipeline.sampling.order import Cursor, Order

_IMAGENET = (1000, 1281)
"""Shards and samples a shard of ImageNet-1k's training set: 1.28 million images."""
_OUR_BATCH = "our first batch (dataset opened, order, index, samples)"
_RESUME = "resume (1.28 M samples, 1,000 shards): open, order, index of a batch"


@dataclass
class Arguments:
    """Measure reads from object storage, against plain clients in the same run."""

    uri: str = ""
    """Dataset in S3 to read. Empty: make one and serve it on loopback."""
    num_shards: int = 64
    """Shards of the dataset that is made."""
    shard_mb: float = 20.0
    """Megabytes of each of its shards."""
    streams: int = 8
    """Concurrent reads where throughput is measured."""
    batch_size: int = 256
    """Samples of the first batch."""
    batch_streams: int = 32
    """Concurrent reads of the plain clients where a batch is measured."""
    runs: int = 5
    """Times that everything is measured, in turns."""
    json: bool = False
    """Write JSON to stdout instead of tables."""


class Measurements:
    """Seconds by name, over all runs."""

    def __init__(self) -> None:
        self.times_s: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """Measure one call."""
        started_s = time.perf_counter()
        result = call()
        self.times_s[name].append(time.perf_counter() - started_s)
        return result

    def in_turns(self, ways: dict[str, Callable[[], Any]]) -> None:
        """Measure several ways of doing one thing; who goes first changes from run to run."""
        names = list(ways)
        first = len(self.times_s[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            self.time(name, ways[name])

    def median_s(self, name: str) -> float:
        """Return the middle of the runs."""
        return median(self.times_s[name])


class _Throughput:
    """Whole shards: our reads, and staging with hash and disk, beside the plain clients."""

    def __init__(self, dataset: Manifest, arguments: Arguments) -> None:
        self._dataset, self._arguments = dataset, arguments
        self.bucket, prefix = _bucket_and_prefix(dataset.uri)
        info = dataset.info
        self.keys = [f"{prefix}{dataset.shard_name(s)}" for s in range(info.num_shards)]
        self.num_bytes = sum(dataset.shard_bytes(s) for s in range(info.num_shards))
        self.clients = plain_clients(self.bucket)

    def run(self, measured: Measurements) -> None:
        """Read all shards once in every way."""
        streams = self._arguments.streams
        ways: dict[str, Callable[[], Any]] = {
            f"{name}, whole objects": partial(read_objects, client, self.keys, streams=streams)
            for name, client in self.clients.items()
        }
        measured.in_turns(ways | {"our reads": self._ours})
        with tempfile.TemporaryDirectory(prefix="maelstrom-bench-") as folder:
            measured.in_turns(
                {
                    "our staging (store to verified files)": lambda: self._stage(
                        Path(folder) / "cache"
                    ),
                    "plain writes of as much, synced": lambda: self._write(Path(folder)),
                }
            )

    def _ours(self) -> int:
        jobs = [
            (
                self._dataset.shard_uri(s),
                start,
                min(PART_BYTES, self._dataset.shard_bytes(s) - start),
            )
            for s in range(self._dataset.info.num_shards)
            for start in range(0, self._dataset.shard_bytes(s), PART_BYTES)
        ]
        with ThreadPoolExecutor(self._arguments.streams) as pool:
            return sum(pool.map(lambda job: len(storage.read_view(*job)), jobs))

    def _write(self, folder: Path) -> None:
        def write(s: int) -> None:
            with (folder / str(s)).open("wb") as file:
                file.write(bytes(self._dataset.shard_bytes(s)))
                file.flush()
                os.fdatasync(file.fileno())

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(self._dataset.info.num_shards)))

    def _stage(self, folder: Path) -> None:
        cache = ShardCache(self._dataset, folder=folder, max_bytes=2 * self.num_bytes)
        cache.need(range(self._dataset.info.num_shards))
        cache.begin()
        cache.wait()
        cache.close()
        assert cache.counters.staged_shards == self._dataset.info.num_shards


class _FirstBatch:
    """The samples of a first batch, by their ranges: our reader with a cold cache beside the plain
    clients."""

    def __init__(self, dataset: Manifest, arguments: Arguments, throughput: _Throughput) -> None:
        self._uri, self._arguments, self._throughput = dataset.uri, arguments, throughput
        _, prefix = _bucket_and_prefix(dataset.uri)
        rows = dataset.lookup(_first_share(dataset, arguments.batch_size))
        self._jobs: list[Job] = [
            (f"{prefix}{dataset.shard_name(int(shard))}", int(offset), int(size))
            for shard, offset, size in zip(rows.shards_B, rows.offsets_B, rows.sizes_B, strict=True)
        ]

    def run(self, measured: Measurements) -> None:
        """Read the batch once in every way."""
        ways: dict[str, Callable[[], Any]] = {
            f"{name}, ranges": partial(
                read_ranges, client, self._jobs, streams=self._arguments.batch_streams
            )
            for name, client in self._throughput.clients.items()
        }
        opened: list[ShardReader] = []
        with tempfile.TemporaryDirectory(prefix="maelstrom-bench-") as folder:
            measured.in_turns(ways | {_OUR_BATCH: lambda: opened.append(self._ours(folder))})
            opened[0].close()

    def _ours(self, folder: str) -> ShardReader:
        dataset = open_dataset(self._uri)
        reader = ShardReader(
            dataset, cache_dir=Path(folder), cache_bytes=2 * self._throughput.num_bytes
        )
        ids_B = _first_share(dataset, self._arguments.batch_size)
        reader.prepare(dataset.locate(ids_B)[0].tolist())
        images, bad = reader.read(dataset.lookup(ids_B))
        assert len(images) == self._arguments.batch_size
        assert not bad
        return reader


class _SecondEpoch:
    """Every sample in the order of an epoch: from the cache, and from the same shards on local
    disk."""

    def __init__(
        self, dataset: Manifest, local: Manifest, folder: Path, arguments: Arguments
    ) -> None:
        self._readers = {
            "local shards": ShardReader(local),
            "cache, second epoch": ShardReader(dataset, cache_dir=folder, cache_bytes=2**40),
        }
        self._dataset, self._batch = dataset, arguments.batch_size
        for reader in self._readers.values():
            reader.prepare(range(dataset.info.num_shards))
        cached = self._readers["cache, second epoch"]
        cached.read(dataset.lookup(np.arange(1)))
        cache = cached._cache
        assert cache is not None
        cache.wait()

    def run(self, measured: Measurements) -> None:
        """Read an epoch from both, twice."""
        for _ in range(2):
            measured.in_turns(
                {name: partial(self._epoch, reader) for name, reader in self._readers.items()}
            )
        assert self._readers["cache, second epoch"].counters.read_through <= 1

    def _epoch(self, reader: ShardReader) -> int:
        order = Order(
            self._dataset.shard_sizes, config=OrderConfig(), seed=1, global_batch_size=self._batch
        )
        total, cursor = 0, Cursor()
        while cursor.epoch == 0:
            share = order.rank_batch(cursor)
            images, _ = reader.read(self._dataset.lookup(share.sample_ids_B))
            total += sum(
                len(image.tobytes()) for image in images
            )  # copied, so that every page is touched
            cursor = share.end
        return total

    def close(self) -> None:
        """Let go of both."""
        for reader in self._readers.values():
            reader.close()


def _resume(folder: Path, measured: Measurements) -> None:
    """Find the samples of a batch at places all over ten epochs of a dataset of ImageNet's size,
    from a cold start."""
    for epoch, share_of_epoch in ((0, 0.0), (0, 0.37), (3, 0.999), (9, 0.5)):

        def start(epoch: int = epoch, share_of_epoch: float = share_of_epoch) -> None:
            dataset = open_dataset(str(folder))
            order = Order(
                dataset.shard_sizes,
                config=OrderConfig(),
                seed=0,
                global_batch_size=4096,
                world_size=8,
            )
            position = int(order.num_samples * share_of_epoch)
            dataset.lookup(order.rank_batch(Cursor(epoch, position)).sample_ids_B)

        measured.time(_RESUME, start)


def _first_share(dataset: Manifest, count: int) -> Any:
    order = Order(dataset.shard_sizes, config=OrderConfig(), seed=0, global_batch_size=count)
    return order.rank_batch(Cursor()).sample_ids_B


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, f"{prefix.rstrip('/')}/" if prefix else ""


@contextmanager
def _data(arguments: Arguments) -> Iterator[tuple[str, Path]]:
    """Give the dataset's URI and the same shards on local disk."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maelstrom-bench-")))
        local = root / "buckets" / "bench" / "data"
        if arguments.uri:
            local.mkdir(parents=True)
            for file in storage.list_files(arguments.uri):
                (local / file.name).write_bytes(storage.read_view(file.uri))
            yield arguments.uri, local
            return
        say(f"storage_bench: making {arguments.num_shards} shards of {arguments.shard_mb:g} MB")
        write_bench_dataset(
            local, num_shards=arguments.num_shards, shard_bytes=int(arguments.shard_mb * 1e6)
        )
        stack.enter_context(loopback_store(root / "buckets"))
        yield "s3://bench/data", local


def measure(arguments: Arguments) -> dict[str, Any]:
    """Measure everything and return seconds, rates and the ratios that matter."""
    measured = Measurements()
    with (
        _data(arguments) as (uri, local),
        tempfile.TemporaryDirectory(prefix="maelstrom-bench-") as folder,
    ):
        dataset = open_dataset(uri)
        throughput = _Throughput(dataset, arguments)
        first_batch = _FirstBatch(dataset, arguments, throughput)
        second_epoch = _SecondEpoch(
            dataset, open_dataset(str(local)), Path(folder) / "cache", arguments
        )
        generate_manifest(
            Path(folder) / "imagenet", num_shards=_IMAGENET[0], samples_per_shard=_IMAGENET[1]
        )
        for run in range(1 + arguments.runs):
            say(
                f"storage_bench: run {run} of {arguments.runs}"
                + (" (to warm up, not counted)" if not run else "")
            )
            into = measured if run else Measurements()
            first_batch.run(into)
            throughput.run(into)
            second_epoch.run(into)
            _resume(Path(folder) / "imagenet", into)
        second_epoch.close()
        return _result(measured, throughput, arguments)


def _result(
    measured: Measurements, throughput: _Throughput, arguments: Arguments
) -> dict[str, Any]:
    whole = [measured.median_s(f"{name}, whole objects") for name in throughput.clients]
    ranges = {name: measured.median_s(f"{name}, ranges") for name in throughput.clients}
    ours_s = measured.median_s(_OUR_BATCH)
    sizes = {
        name: throughput.num_bytes
        for name in measured.times_s
        if "whole" in name or name.startswith("our reads")
    }
    sizes |= dict.fromkeys(("local shards", "cache, second epoch"), throughput.num_bytes)
    sizes |= {
        name: throughput.num_bytes
        for name in measured.times_s
        if "staging" in name or "writes" in name
    }
    rows = [
        {
            "what": name,
            "median_s": median(times_s),
            "min_s": min(times_s),
            "max_s": max(times_s),
            "mb_per_s": sizes[name] / median(times_s) / 1e6 if name in sizes else None,
        }
        for name, times_s in measured.times_s.items()
    ]
    ratios = {
        "throughput of our reads / fastest plain client": min(whole)
        / measured.median_s("our reads"),
        "throughput of the cache in epoch 2 / local shards": measured.median_s("local shards")
        / measured.median_s("cache, second epoch"),
        "time of our first batch / fastest plain client's ranges": ours_s / min(ranges.values()),
        **{
            f"time of our first batch / {name}'s ranges": ours_s / time_s
            for name, time_s in ranges.items()
        },
        "slowest resume in seconds": max(measured.times_s[_RESUME]),
    }
    return {
        "settings": asdict(arguments),
        "num_bytes": throughput.num_bytes,
        "rows": rows,
        "ratios": ratios,
    }
