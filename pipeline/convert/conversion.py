"""A conversion from listing to commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from pipeline import storage
from pipeline.console import Progress, say
from pipeline.convert.commit import commit
from pipeline.convert.plan import Plan, make_plan
from pipeline.convert.processes import make_in_processes, warm_up
from pipeline.convert.ray_tasks import make_in_ray
from pipeline.convert.settings import ConvertSettings
from pipeline.convert.shard import PARTS_FOLDER, Part, ShardTask, make_shard, read_part
from pipeline.convert.target import (
    Job,
    check_target,
    claim,
    clean_up,
    find_finished,
    list_target,
    lock_target,
)
from pipeline.convert.workers import Workers, cores
from pipeline.dataset.info import PLAN_FILE, DatasetInfo
from pipeline.dataset.unpacked import is_packed, unpacked
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.formats.records import suffix_of
from pipeline.images.upright import turbojpeg
from pipeline.sources.choose import list_source, open_source
from pipeline.sources.listing import Listing
from pipeline.sources.names import pick, sample_keys
from pipeline.storage.uri import absolute


def convert(
    src: str, dst: str, settings: ConvertSettings | None = None, *, workers: int = 0
) -> DatasetInfo:
    """Make a dataset of a collection of images, or finish one that was begun.

    Args:
        src: What `open_source` knows; a path or a URI.
        dst: Folder of the shards; new, empty, or this conversion's own.
        settings: What to make.
        workers: Processes; 0 means one per core that this process may use.

    Returns:
        What `dataset.json` says.

    Raises:
        ConfigError: The settings cannot work, or `dst` holds something else.
        DataError: No image can be used.
        InfrastructureError: Reading or writing failed; the same call continues later.
    """
    info = convert_job(
        src,
        dst,
        settings,
        workers=Workers(count=workers),
    )
    if info is None:
        raise DataError(
            f"convert: shards have vanished from {storage.redact(dst)}. Run the same command again."
        )
    return info


def convert_job(
    src: str,
    dst: str,
    settings: ConvertSettings | None = None,
    *,
    job: Job | None = None,
    workers: Workers | None = None,
) -> DatasetInfo | None:
    """Make one job's shards of a dataset; the job that finds all shards made commits the dataset.

    Committing is idempotent: if two jobs find that at the same time, both write the same bytes.

    Args:
        src: As for `convert`.
        dst: As for `convert`; one folder that all jobs see.
        settings: What to make; the same in all jobs.
        job: Which shards; None means all.
        workers: Who makes them; None means a process per core.

    Returns:
        What `dataset.json` says, or None if other jobs still have shards to make.

    Raises:
        As `convert` does.
    """
    settings = settings or ConvertSettings()
    job = job or Job()
    workers = workers or Workers()
    if settings.turns:
        turbojpeg()  # if it is missing, that is told before the first shard
    check_target(src, dst)
    # A worker may have another working folder, as those of a Ray cluster do.
    src = storage.absolute_named(src)
    dst = absolute(dst)
    warm_up(workers)
    # Looked into only for a cluster: it reads the first bytes of every archive.
    if workers.ray_address is not None and is_packed(src):
        raise ConfigError(
            f"convert: {storage.redact(src)} is packed with gzip, and is unpacked on this machine, "
            "where the nodes of --ray-address cannot read it. Unpack it where all nodes see it."
        )
    with unpacked(src) as plain:
        return _convert_plain(
            plain,
            dst,
            settings,
            job=job,
            workers=workers,
        )


def _convert_plain(
    src: str, dst: str, settings: ConvertSettings, *, job: Job, workers: Workers
) -> DatasetInfo | None:
    """Do what `convert_job` does, from a source that is not packed."""
    listing = list_source(open_source(src, settings), src, settings)
    plan = make_plan(listing, settings)

    done = find_finished(dst, plan)
    if done is not None:
        say(
            f"convert: {dst} is finished already: {done.num_samples:,} images in "
            f"{done.num_shards:,} shards"
        )
        # A run that was killed between the commit and cleaning up leaves its plan.
        if storage.exists(storage.join(dst, PLAN_FILE)):
            clean_up(dst)
        return done

    with lock_target(dst, job):
        try:
            claim(
                dst,
                plan,
                job,
            )
            parts = _make_parts(
                listing,
                dst,
                plan,
                job,
                workers,
            )
            if parts is None:
                return None
            info = commit(
                listing,
                dst,
                plan,
                parts,
            )
        except MaelstromError:
            # Another job may have committed and cleaned up while this one still looked.
            done = None if job.is_alone else find_finished(dst, plan)
            if done is None:
                raise
            return done
        clean_up(dst)
    return info


def _find_parts(
    dst: str,
    plan: Plan,
    shards: Iterable[int],
) -> dict[int, Part]:
    """Return the parts of the shards that are finished."""
    identity = plan.identity()
    sizes = {file.name: file.size_bytes for file in list_target(dst)}
    found: dict[int, Part] = {}
    for shard in shards:
        stem = plan.shard_stem(shard)
        if f"{PARTS_FOLDER}/{stem}.parquet" in sizes:
            read = read_part(
                dst,
                stem,
                identity=identity,
                container=plan.settings.format,
            )
            if read is None:
                continue
            part = read[0]
            size_bytes = 0 if part.file is None else part.file.size_bytes
            if size_bytes == sizes.get(stem + suffix_of(plan.settings.format), 0):
                found[shard] = part
    return found


def _make_parts(
    listing: Listing, dst: str, plan: Plan, job: Job, workers: Workers
) -> list[Part] | None:
    """Make every shard of the job that is not there yet.

    Returns:
        The parts of all shards in order, or None if some of other jobs are missing.
    """
    mine = [shard for shard in range(plan.num_shards) if shard in job]
    parts = _find_parts(
        dst,
        plan,
        mine,
    )
    missing = [shard for shard in mine if shard not in parts]
    images_per_shard = np.diff(plan.bounds)
    total = int(images_per_shard[mine].sum())
    with Progress(f"Converting to {storage.name_of(dst)}", total=total) as progress:
        for part in parts.values():
            progress.skip(part.num_images)
        task = _task_maker(
            listing,
            dst,
            plan,
        )
        for shard, part in make_shards(
            missing,
            task,
            workers,
            target=dst,
        ):
            parts[shard] = part
            progress.advance(part.num_images, size_bytes=part.read_bytes)

    # After this job's own shards: the other jobs had that long to make theirs.
    others = [shard for shard in range(plan.num_shards) if shard not in job]
    parts |= _find_parts(
        dst,
        plan,
        others,
    )
    num_missing = plan.num_shards - len(parts)
    if num_missing:
        say(
            f"convert: this job's {len(mine):,} shards are made; {num_missing:,} of other jobs are "
            "not. The job that finishes last writes dataset.json; any of the commands does if you "
            "run it again."
        )
        return None
    return [parts[shard] for shard in range(plan.num_shards)]


def _task_maker(
    listing: Listing,
    dst: str,
    plan: Plan,
) -> Callable[[int], ShardTask]:
    """Return what tells of a shard what it is made of."""
    identity = plan.identity()
    keys = sample_keys(listing.names) if listing.keys is None else listing.keys

    def task(shard: int) -> ShardTask:
        rows = plan.order[plan.bounds[shard] : plan.bounds[shard + 1]]
        return ShardTask(
            source=listing.uri,
            source_kind=listing.kind,
            target=dst,
            stem=plan.shard_stem(shard),
            identity=identity,
            settings=plan.settings,
            wanted=listing.wanted(rows),
            keys=pick(keys, rows),
            labels=listing.labels[rows].tolist(),
            classes=listing.classes,
        )

    return task


def make_shards(
    shards: Sequence[int],
    task: Callable[[int], ShardTask],
    workers: Workers,
    *,
    target: str,
) -> Iterator[tuple[int, Part]]:
    """Make shards and yield their parts as they are finished.

    Args:
        shards: Their numbers.
        task: Tells what a shard is made of; called when its work is handed out.
        workers: Who makes them.
        target: Folder that the shards are written to.

    Raises:
        ConfigError: The workers cannot write there.
        InfrastructureError: A worker was killed, or kept failing.
    """
    if not shards:
        return iter(())
    is_in_memory = target.startswith("memory:")
    if workers.engine == "ray":
        if is_in_memory:
            raise ConfigError(
                "convert: memory:// belongs to one process, so Ray's workers cannot write there. "
                "Give a folder or object storage."
            )
        return make_in_ray(
            shards,
            task,
            workers,
        )

    count = min(workers.count or cores(), len(shards))
    # A pool costs a second to start, and its processes would not see this one's memory://.
    if count == 1 or is_in_memory:
        return ((shard, make_shard(task(shard))) for shard in shards)
    return make_in_processes(
        shards,
        task,
        count,
    )
