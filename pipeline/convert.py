"""Turn a folder of images into shards: `python -m pipeline.convert SRC DST`.

The dataset is there when `dataset.json` is, and not before. Until then `_plan.json` marks the folder; the same command
goes on where it was stopped and makes only the missing shards, byte for byte what an undisturbed run makes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from pydantic import ValidationError

from pipeline import storage
from pipeline.command import run_command, say, say_json
from pipeline.convert_plan import Container, ConvertSettings, Plan, WriteMode, make_plan, parse_size, tool_version
from pipeline.convert_target import check_places, claim, clean_up, find_finished, list_target, lock_target
from pipeline.convert_task import (
    PARTS_FOLDER,
    Part,
    ShardTask,
    finished_shard,
    make_shard,
    make_shard_in_worker,
    read_part,
    start_worker,
)
from pipeline.dataset_info import DatasetInfo
from pipeline.dataset_writer import FinishedShard, write_dataset
from pipeline.errors import ConfigError, DataError, InfrastructureError
from pipeline.formats.container import suffix_of
from pipeline.manifest import PLAN_FILE
from pipeline.progress import Progress
from pipeline.sources import LabelMode, Listing, open_source, pick, sample_keys

REJECTED_FILE = "rejected.parquet"


def convert(src: str, dst: str, settings: ConvertSettings | None = None, *, workers: int = 0) -> DatasetInfo:
    """Make a dataset of a folder of images, or finish one that was begun.

    Args:
        src: Folder of class folders, a flat folder without labels, or a dataset; a path or a URI.
        dst: Folder of the shards; new, empty, or this conversion's own.
        settings: What to make.
        workers: Processes; 0 means the cores this process may use.

    Returns:
        What `dataset.json` says.

    Raises:
        ConfigError: The settings cannot work, or `dst` holds something else.
        DataError: No usable image.
        InfrastructureError: Reading or writing failed; the same call goes on later.
    """
    settings = settings or ConvertSettings()
    check_places(src, dst)
    listing = open_source(src, settings).listing()
    plan = make_plan(listing, settings)
    done = find_finished(dst, plan)
    if done is not None:
        say(f"convert: {dst} is finished already: {done.num_samples:,} images in {done.num_shards:,} shards")
        if storage.exists(storage.join(dst, PLAN_FILE)):  # killed between the commit and cleaning up
            with lock_target(dst):
                clean_up(dst)
        return done
    with lock_target(dst):
        claim(dst, plan)
        parts = _make_parts(listing, dst, plan, workers=workers or _cores())
        info = _commit(listing, dst, plan, parts)
        clean_up(dst)
    return info


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_parts(listing: Listing, dst: str, plan: Plan, *, workers: int) -> list[Part]:
    """Make every shard that is not there yet; return all parts in order."""
    identity = plan.identity()
    sizes = {file.name: file.size_bytes for file in list_target(dst)}
    parts: dict[int, Part] = {}
    for shard in range(plan.num_shards):
        stem = plan.shard_stem(shard)
        if f"{PARTS_FOLDER}/{stem}.parquet" in sizes:
            found = read_part(dst, stem, identity=identity)
            if found is not None and found[0].size_bytes == sizes.get(stem + suffix_of(plan.settings.format), 0):
                parts[shard] = found[0]
    missing = [shard for shard in range(plan.num_shards) if shard not in parts]
    keys = sample_keys(listing.names) if listing.keys is None else listing.keys

    def task(shard: int) -> ShardTask:
        places = plan.order[plan.bounds[shard] : plan.bounds[shard + 1]]
        return ShardTask(
            source=listing.uri,
            source_kind=listing.kind,
            target=dst,
            stem=plan.shard_stem(shard),
            identity=identity,
            settings=plan.settings,
            wanted=listing.wanted(places),
            keys=pick(keys, places),
            labels=listing.labels[places].tolist(),
            classes=listing.classes,
        )

    with Progress(f"Converting to {storage.name_of(dst)}", total=len(plan.order)) as progress:
        for part in parts.values():
            progress.skip(part.num_images)
        made = _in_processes if workers > 1 and len(missing) > 1 and not dst.startswith("memory:") else _in_this_process
        for shard, part in made([(shard, task) for shard in missing], workers=min(workers, len(missing))):
            parts[shard] = part
            progress.advance(part.num_images, size_bytes=part.read_bytes)
    return [parts[shard] for shard in range(plan.num_shards)]


def _in_this_process(jobs: list[tuple[int, Callable[[int], ShardTask]]], *, workers: int) -> Iterator[tuple[int, Part]]:
    for shard, task in jobs:
        yield shard, make_shard(task(shard))


def _in_processes(jobs: list[tuple[int, Callable[[int], ShardTask]]], *, workers: int) -> Iterator[tuple[int, Part]]:
    """Yield parts as they are finished. A failure stops the rest at the next image."""
    # spawn: the caller may run threads (CUDA, fsspec), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    waiting: dict[Future[Part], int] = {}
    left = iter(jobs)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(stop,)) as pool:
        try:
            while True:
                while len(waiting) < 2 * workers and (job := next(left, None)) is not None:
                    waiting[pool.submit(make_shard_in_worker, job[1](job[0]))] = job[0]
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InfrastructureError(
                "convert: a worker process was killed, most likely for want of memory. Run the same command again with "
                f"fewer --workers (now {workers}); finished shards are kept."
            ) from error
        finally:
            stop.set()
            for future in waiting:
                future.cancel()


def _commit(listing: Listing, dst: str, plan: Plan, parts: list[Part]) -> DatasetInfo:
    """Write what neighbours read, the list of refused images, the manifest, and last `dataset.json`."""
    reasons = Counter(reason for part in parts for _, reason in part.rejected)
    kept = [part for part in parts if part.num_samples]
    if not kept:
        seen = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        raise DataError(
            f"convert: none of the {len(plan.order)} images in {storage.redact(listing.uri)} can be used: {seen}. "
            f"Check the source; {storage.redact(dst)} holds no dataset."
        )
    if reasons:
        _write_rejected(dst, parts)
    for name, content in _neighbour_files(plan, kept).items() if plan.settings.format == "webdataset" else ():
        storage.write_atomic(storage.join(dst, name), json.dumps(content, indent=1).encode() + b"\n")

    def shards() -> Iterator[FinishedShard]:
        for part in kept:
            shard = finished_shard(dst, part.stem, identity=plan.identity(), container=plan.settings.format)
            if shard is not None:
                yield shard

    return write_dataset(
        dst,
        shards=shards(),
        name=plan.settings.split,
        container=plan.settings.format,
        classes=listing.classes,
        made_by={"tool": "pipeline.convert", "version": tool_version(), "plan": plan.describe()},
        versions={"pyarrow": pa.__version__, **plan.describe()["versions"]},
    )


def _write_rejected(dst: str, parts: Sequence[Part]) -> None:
    rows = [row for part in parts for row in part.rejected]
    table = pa.table({"key": [name for name, _ in rows], "reason": [reason for _, reason in rows]})
    with tempfile.TemporaryDirectory(prefix="maelstrom-rejected-") as folder:
        path = Path(folder) / REJECTED_FILE
        pq.write_table(table, path)
        storage.put_file(path, storage.join(dst, REJECTED_FILE))


def _neighbour_files(plan: Plan, kept: Sequence[Part]) -> dict[str, Any]:
    """Return what the wids library (`*-wids.json`) and timm (`_info.json`) read beside the tars."""
    split = plan.settings.split
    names = [part.stem + suffix_of(plan.settings.format) for part in kept]
    counts = [part.num_samples for part in kept]
    shards = [
        {"url": name, "nsamples": count, "filesize": part.size_bytes}
        for name, count, part in zip(names, counts, kept, strict=True)
    ]
    info = {"name": split, "num_samples": sum(counts), "filenames": names, "shard_lengths": counts}
    return {
        f"{split}-wids.json": {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": split,
            "shardlist": shards,
        },
        "_info.json": {"splits": {split: info}},
    }


@dataclass(frozen=True)
class Arguments:
    """Turn a folder of images, or a dataset, into shards with an index.

    SRC is a folder of class folders (labels are the sorted folder names), a flat folder (no labels), or a dataset of
    tars or betons, which keeps its order, keys, labels and shards. DST becomes the dataset: shards, manifest.parquet,
    dataset.json. Stop and run again as you like: the same command goes on.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder of images or dataset: a path, s3://, gs:// or az://."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder of the shards: new, empty, or this conversion's own."""
    format: Container = "webdataset"
    """Container of the shards: tars, or FFCV's betons."""
    write_mode: WriteMode = "jpg"
    """ffcv: jpg stores JPEG files (as they are unless resized), raw stores pixels, smart stores small images raw."""
    smart_threshold: str = "256KiB"
    """ffcv, smart: pixels (height x width x 3 bytes) up to this size are stored raw."""
    shard_size: str = "256MB"
    """Size a shard should have (MB, GB, MiB, GiB); an estimate with --resize."""
    samples_per_shard: int | None = None
    """Images of a shard, instead of --shard-size."""
    resize: int | None = None
    """Shorter side in pixels that larger images are shrunk to. None: images are stored as they are."""
    max_resolution: int | None = None
    """Longer side in pixels that larger images are shrunk to. None: no limit."""
    quality: int = 90
    """JPEG quality (1-100) of images that are shrunk."""
    workers: int = 0
    """Processes. 0: as many as there are cores. The result does not depend on it."""
    shuffle_seed: str = "0"
    """Seed of the order images are stored in, or none: by name. A dataset keeps its order."""
    split: str = "train"
    """Name of the dataset and first part of the shards' names."""
    limit: int | None = None
    """Images to take, the first in the stored order. None: all."""
    labels: LabelMode = "auto"
    """folders: the first folder is the class. none: no labels. auto: folders, where every image lies in one."""
    dry_run: bool = False
    """Say what would be made, and write nothing."""
    strict: bool = False
    """Stop with exit code 3 at the first image that cannot be used, instead of leaving it out."""
    json: bool = False
    """Write the result to stdout as JSON."""


def _settings(arguments: Arguments) -> ConvertSettings:
    seed = arguments.shuffle_seed.strip().lower()
    if seed != "none" and not seed.isdecimal():
        raise ConfigError(f"convert: --shuffle-seed {arguments.shuffle_seed!r}: give a number from 0, or none.")
    try:
        return ConvertSettings(
            format=arguments.format,
            write_mode=arguments.write_mode,
            smart_threshold_bytes=parse_size(arguments.smart_threshold, option="--smart-threshold"),
            max_resolution=arguments.max_resolution,
            shard_size_bytes=parse_size(arguments.shard_size),
            samples_per_shard=arguments.samples_per_shard,
            resize=arguments.resize,
            quality=arguments.quality,
            shuffle_seed=None if seed == "none" else int(seed),
            split=arguments.split,
            limit=arguments.limit,
            labels=arguments.labels,
            strict=arguments.strict,
        )
    except ValidationError as error:
        found = "; ".join(
            f"--{'-'.join(str(part) for part in item['loc']).replace('_', '-')} {item['input']!r}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigError(f"convert: {found}") from None


def _dry_run(arguments: Arguments, settings: ConvertSettings) -> dict[str, Any]:
    check_places(arguments.src, arguments.dst)
    listing = open_source(arguments.src, settings).listing()
    plan = make_plan(listing, settings)
    found = find_finished(arguments.dst, plan)
    return {
        "num_images": len(plan.order),
        "source_bytes": int(listing.sizes[plan.order].sum()),
        "num_classes": len(listing.classes or []),
        "num_shards": plan.num_shards,
        "passed_over": listing.passed_over,
        "finished": found is not None,
    }


def _run(arguments: Arguments) -> int:
    settings = _settings(arguments)
    if arguments.workers < 0:
        raise ConfigError(f"convert: --workers {arguments.workers}: at least 0.")
    if arguments.dry_run:
        planned = _dry_run(arguments, settings)
        if arguments.json:
            say_json(planned)
        else:
            say(
                f"convert: would make {planned['num_shards']:,} shards of {planned['num_images']:,} images "
                f"({planned['source_bytes'] / 1e6:,.1f} MB, {planned['num_classes']:,} classes); nothing was written"
            )
        return 0
    info = convert(arguments.src, arguments.dst, settings, workers=arguments.workers)
    num_rejected = info.made_by["plan"]["num_images"] - info.num_samples
    if arguments.json:
        say_json(
            {
                "dataset": storage.redact(arguments.dst),
                "num_samples": info.num_samples,
                "num_shards": info.num_shards,
                "num_rejected": num_rejected,
                "fingerprint": info.fingerprint,
            }
        )
    else:
        left_out = f"; {num_rejected:,} images left out, see {REJECTED_FILE}" if num_rejected else ""
        say(f"convert: {info.num_samples:,} images in {info.num_shards:,} shards at {arguments.dst}{left_out}")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = tyro.cli(
        Arguments, args=args, prog="python -m pipeline.convert", config=(tyro.conf.FlagCreatePairsOff,)
    )
    return run_command(
        lambda: _run(arguments),
        interrupted="convert: stopped. Finished shards are kept; the same command goes on from here.",
    )


if __name__ == "__main__":
    sys.exit(main())
