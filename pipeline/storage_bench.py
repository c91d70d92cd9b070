"""Measure reading from storage: `python -m pipeline.storage_bench [--uri s3://bucket/dataset]`.

Everything is compared with what plain clients do with the same bytes in the same run, in turns, so
that the figures of a busy or a slow machine still say something. Without `--uri` it makes a
dataset, serves it on loopback and stops the store at the end.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.storage_bench")

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.bench.command import BenchArguments, Outcome, report, run_bench
from pipeline.bench.generated_dataset import generate_manifest
from pipeline.bench.storage_clients import (
    Job,
    loopback_store,
    plain_clients,
    read_objects,
    read_ranges,
    write_bench_dataset,
)
from pipeline.bench.turns import Spread, Turns
from pipeline.config import OrderConfig
from pipeline.console import say
from pipeline.dataset import Manifest, open_dataset
from pipeline.errors import ConfigError
from pipeline.options import BatchSize, Location, Megabytes, Rounds, Streams
from pipeline.reading.cache import PART_BYTES, ShardCache
from pipeline.reading.reader import ShardReader
from pipeline.sampling.order import Cursor, Order

_IMAGENET = (1000, 1281)
"""Shards, and samples per shard, of ImageNet-1k's training set: 1.28 million images."""
_RESUME_AT = ((0, 0.0), (0, 0.37), (3, 0.999), (9, 0.5))
"""Epochs, and shares of them, at which a run is resumed: all over ten epochs."""
_RANGES = ", ranges"
_OUR_READS = "our reads"
_OUR_STAGING = "our staging (store to verified files)"
_PLAIN_WRITES = "plain writes of as much, synced"
_LOCAL = "local shards"
_CACHE = "cache, second epoch"
_OUR_BATCH = "our first batch (dataset opened, order, index, samples)"
_RESUME = "resume (1.28 M samples, 1,000 shards): open, order, index of a batch"


@dataclass(frozen=True)
class Arguments(BenchArguments):
    """Measure reads from object storage, against plain clients in the same run."""

    uri: Location = ""
    """Dataset in S3 to read. Empty: make one and serve it on loopback."""
    num_shards: Rounds = 64
    """Shards of the dataset that is made."""
    shard_mb: Megabytes = 20.0
    """Megabytes of each of its shards."""
    streams: Streams = 8
    """Concurrent reads of whole shards."""
    batch_size: BatchSize = 256
    """Samples of the first batch."""
    batch_streams: Streams = 32
    """Concurrent reads of a batch by the plain clients."""
    runs: Rounds = 5
    """Rounds, after one to warm up."""


class _Throughput:
    """Whole shards: our reads, and staging with hash and disk, next to the plain clients."""

    def __init__(self, dataset: Manifest, arguments: Arguments) -> None:
        self._dataset = dataset
        self._streams = arguments.streams
        self._num_shards = dataset.info.num_shards
        bucket, prefix = _bucket_and_prefix(dataset.uri)
        numbers = range(self._num_shards)
        self.keys = []
        self.num_bytes = 0
        for s in numbers:
            self.keys.append(f"{prefix}{dataset.shard_name(s)}")
            self.num_bytes += dataset.shard_bytes(s)
        self.clients = plain_clients(bucket)

    def take(self, turns: Turns) -> None:
        """Read all shards once in every way."""
        ways: dict[str, Callable[[], Any]] = {_OUR_READS: self._ours}
        for name, client in self.clients.items():
            read = partial(read_objects, client, self.keys, streams=self._streams)
            ways[_whole(name)] = read
        turns.take_timed(ways)
        # Apart from the reads: what these two leave to be written would slow a read behind them.
        with tempfile.TemporaryDirectory(prefix="maelstrom-bench-") as folder:
            cache_folder = Path(folder) / "cache"
            stage = partial(self._stage, cache_folder)
            write = partial(self._write, Path(folder))
            turns.take_timed({_OUR_STAGING: stage, _PLAIN_WRITES: write})

    def _ours(self) -> int:
        jobs = []
        for s in range(self._num_shards):
            uri = self._dataset.shard_uri(s)
            size = self._dataset.shard_bytes(s)
            # In the cache's own parts, so that the two figures differ by hash and disk alone.
            for start in range(0, size, PART_BYTES):
                length = min(PART_BYTES, size - start)
                jobs.append((uri, start, length))

        def read(job: tuple[str, int, int]) -> int:
            return len(storage.read_view(*job))

        with ThreadPoolExecutor(self._streams) as pool:
            return sum(pool.map(read, jobs))

    def _write(self, folder: Path) -> None:
        def write(s: int) -> None:
            path = folder / str(s)
            content = bytes(self._dataset.shard_bytes(s))
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                # What staging does before it renames a shard.
                os.fdatasync(file.fileno())

        # Two at once, as the cache stages them; `list` lets an error of a thread show.
        with ThreadPoolExecutor(2) as pool:
            numbers = range(self._num_shards)
            list(pool.map(write, numbers))

    def _stage(self, folder: Path) -> None:
        # Twice the room that is needed: no shard may be evicted in the middle.
        max_bytes = 2 * self.num_bytes
        cache = ShardCache(self._dataset, folder=folder, max_bytes=max_bytes)
        cache.need(range(self._num_shards))
        cache.begin()
        cache.wait()
        cache.close()
        assert cache.counters.staged_shards == self._num_shards


class _FirstBatch:
    """The samples of a first batch, by their ranges: our reader with a cold cache next to the
    plain clients."""

    def __init__(
        self, dataset: Manifest, arguments: Arguments, throughput: _Throughput
    ) -> None:
        self._uri = dataset.uri
        self._arguments = arguments
        self._throughput = throughput
        # The plain clients are told where the samples lie; ours must find that out by itself.
        sample_ids_B = _first_share(dataset, arguments.batch_size)
        rows = dataset.lookup(sample_ids_B)
        columns = (
            rows.shards_B.tolist(),
            rows.offsets_B.tolist(),
            rows.sizes_B.tolist(),
        )
        self._jobs: list[Job] = []
        for shard, offset, size in zip(*columns, strict=True):
            key = throughput.keys[shard]
            self._jobs.append((key, offset, size))

    def take(self, turns: Turns) -> None:
        """Read the batch once in every way."""
        streams = self._arguments.batch_streams
        ways: dict[str, Callable[[], Any]] = {}
        for name, client in self._throughput.clients.items():
            read = partial(read_ranges, client, self._jobs, streams=streams)
            ways[_ranges(name)] = read
        opened: list[ShardReader] = []
        # A new folder each time: the cache must be cold.
        with tempfile.TemporaryDirectory(prefix="maelstrom-bench-") as folder:
            ways[_OUR_BATCH] = lambda: opened.append(self._ours(folder))
            turns.take_timed(ways)
            # Closing waits for shards that are being staged, and is no part of a first batch.
            opened[0].close()

    def _ours(self, folder: str) -> ShardReader:
        # Everything that a run does before its first batch, opening the dataset included.
        dataset = open_dataset(self._uri)
        cache_bytes = 2 * self._throughput.num_bytes
        reader = ShardReader(dataset, cache_dir=Path(folder), cache_bytes=cache_bytes)
        ids_B = _first_share(dataset, self._arguments.batch_size)
        shards_B, _ = dataset.locate(ids_B)
        reader.prepare(shards_B.tolist())
        rows = dataset.lookup(ids_B)
        images, bad = reader.read(rows)
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
            _LOCAL: ShardReader(local),
            _CACHE: ShardReader(dataset, cache_dir=folder, cache_bytes=2**40),
        }
        self._dataset = dataset
        self._batch = arguments.batch_size
        for reader in self._readers.values():
            reader.prepare(range(dataset.info.num_shards))
        # The first read begins the staging, which is over before anything is measured.
        cached = self._readers[_CACHE]
        one_sample = dataset.lookup(np.arange(1))
        cached.read(one_sample)
        cache = cached._cache
        assert cache is not None
        cache.wait()

    def take(self, turns: Turns) -> None:
        """Read an epoch from both, twice."""
        epochs = {}
        for name, reader in self._readers.items():
            epochs[name] = partial(self._epoch, reader)
        # An epoch from memory is short: two of them halve the noise.
        for _ in range(2):
            turns.take_timed(epochs)
        # The one sample that began the staging; any other came from the cache.
        assert self._readers[_CACHE].counters.read_through <= 1

    def _epoch(self, reader: ShardReader) -> int:
        order = Order(
            self._dataset.shard_sizes,
            config=OrderConfig(),
            seed=1,
            global_batch_size=self._batch,
        )
        total = 0
        cursor = Cursor()
        while cursor.epoch == 0:
            share = order.rank_batch(cursor)
            rows = self._dataset.lookup(share.sample_ids_B)
            images, _ = reader.read(rows)
            # Copied, so that every page of a mapped shard is touched.
            for image in images:
                total += len(image.tobytes())
            cursor = share.end
        return total

    def close(self) -> None:
        """Let go of both."""
        for reader in self._readers.values():
            reader.close()


def _resume(folder: Path, epoch: int, share_of_epoch: float) -> None:
    """Find the samples of a batch somewhere in a dataset of ImageNet's size, from a cold start."""
    dataset = open_dataset(str(folder))
    order = Order(
        dataset.shard_sizes,
        config=OrderConfig(),
        seed=0,
        global_batch_size=4096,
        world_size=8,
    )
    position = int(order.num_samples * share_of_epoch)
    cursor = Cursor(epoch, position)
    share = order.rank_batch(cursor)
    dataset.lookup(share.sample_ids_B)


def _first_share(dataset: Manifest, count: int) -> Any:
    order = Order(
        dataset.shard_sizes, config=OrderConfig(), seed=0, global_batch_size=count
    )
    return order.rank_batch(Cursor()).sample_ids_B


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    path = uri.removeprefix("s3://")
    bucket, _, prefix = path.partition("/")
    if prefix:
        prefix = f"{prefix.rstrip('/')}/"
    return bucket, prefix


@contextmanager
def _data(arguments: Arguments) -> Iterator[tuple[str, Path]]:
    """Give the dataset's URI and the same shards on local disk."""
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="maelstrom-bench-")
        )
        root = Path(folder)
        local = root / "buckets" / "bench" / "data"
        if arguments.uri:
            local.mkdir(parents=True)
            # The local shards are what the cache is compared with.
            for file in storage.list_files(arguments.uri):
                content = storage.read_view(file.uri)
                (local / file.name).write_bytes(content)
            yield arguments.uri, local
            return
        say(
            f"storage_bench: making {arguments.num_shards} shards of {arguments.shard_mb:g} MB"
        )
        shard_bytes = int(arguments.shard_mb * 1e6)
        write_bench_dataset(
            local, num_shards=arguments.num_shards, shard_bytes=shard_bytes
        )
        stack.enter_context(loopback_store(root / "buckets"))
        yield "s3://bench/data", local


def measure(arguments: Arguments) -> Outcome:
    """Measure everything; give seconds, rates and the ratios that matter."""
    turns = Turns("storage_bench", rounds=arguments.runs, warm_up_rounds=1)
    with (
        _data(arguments) as (uri, local),
        tempfile.TemporaryDirectory(prefix="maelstrom-bench-") as folder,
    ):
        dataset = open_dataset(uri)
        throughput = _Throughput(dataset, arguments)
        first_batch = _FirstBatch(dataset, arguments, throughput)
        cache = Path(folder) / "cache"
        local_dataset = open_dataset(str(local))
        second_epoch = _SecondEpoch(dataset, local_dataset, cache, arguments)
        imagenet = Path(folder) / "imagenet"
        num_shards, samples_per_shard = _IMAGENET
        generate_manifest(
            imagenet, num_shards=num_shards, samples_per_shard=samples_per_shard
        )
        for _ in turns.rounds():
            first_batch.take(turns)
            throughput.take(turns)
            second_epoch.take(turns)
            for epoch, share_of_epoch in _RESUME_AT:
                resume = partial(_resume, imagenet, epoch, share_of_epoch)
                turns.take_timed({_RESUME: resume})
        second_epoch.close()

    rows = []
    for name in turns.subjects:
        time = turns.spread(name, "wall_s")
        # Of a batch and of a resume the time matters: their bytes are few.
        is_range = name.endswith(_RANGES)
        is_small = is_range or name in (_OUR_BATCH, _RESUME)
        rate = None
        if not is_small:
            rate = throughput.num_bytes / time.median / 1e6
        rows.append({"what": name, "median_s": time, "mb_per_s": rate})
    facts = {"settings": asdict(arguments), "num_bytes": throughput.num_bytes}
    ratios = _ratios(turns, list(throughput.clients))
    return report(rows, ratios=ratios, facts=facts)


def _ratios(turns: Turns, clients: Sequence[str]) -> dict[str, Spread]:
    """Return the ratios that matter, round by round."""
    # Against the best of them on this machine: a slow peer would flatter.
    whole = [_whole(name) for name in clients]
    ranges = [_ranges(name) for name in clients]
    fastest_whole = _fastest(turns, whole)
    fastest_ranges = _fastest(turns, ranges)
    reads = turns.ratio(fastest_whole, _OUR_READS, "wall_s")
    cache = turns.ratio(_LOCAL, _CACHE, "wall_s")
    first_batch = turns.ratio(_OUR_BATCH, fastest_ranges, "wall_s")
    ratios = {
        "throughput of our reads / fastest plain client": reads,
        "throughput of the cache in epoch 2 / local shards": cache,
        "time of our first batch / fastest plain client's ranges": first_batch,
    }
    for name in clients:
        ratio = turns.ratio(_OUR_BATCH, _ranges(name), "wall_s")
        ratios[f"time of our first batch / {name}'s ranges"] = ratio
    slowest_s = turns.spread(_RESUME, "wall_s").high
    ratios["slowest resume in seconds"] = Spread.of([slowest_s])
    return ratios


def _fastest(turns: Turns, names: Sequence[str]) -> str:
    def median_s(name: str) -> float:
        spread = turns.spread(name, "wall_s")
        return spread.median

    return min(names, key=median_s)


def _whole(client: str) -> str:
    return f"{client}, whole objects"


def _ranges(client: str) -> str:
    return f"{client}{_RANGES}"


def _run(arguments: Arguments) -> Outcome:
    # boto3, s3fs and obstore have S3 in common, and nothing else.
    if arguments.uri and not arguments.uri.startswith("s3://"):
        raise ConfigError(
            f"storage_bench: --uri {arguments.uri!r}: the plain clients read s3:// only"
        )
    counts = (
        arguments.runs,
        arguments.num_shards,
        arguments.streams,
        arguments.batch_size,
    )
    if min(counts) < 1:
        raise ConfigError(
            "storage_bench: --runs, --num-shards, --streams and --batch-size are at least 1"
        )
    return measure(arguments)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_bench(Arguments, _run, module="pipeline.storage_bench", args=args)
