"""A conversion from listing to commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from pipeline import storage
from pipeline.console import Progress, say
from pipeline.convert.commit import commit
from pipeline.convert.crew import Crew, cores
from pipeline.convert.plan import Plan, make_plan
from pipeline.convert.processes import _in_processes, warm_up
from pipeline.convert.ray_tasks import _in_ray
from pipeline.convert.settings import ConvertSettings
from pipeline.convert.shard import PARTS_FOLDER, Part, ShardTask, make_shard, read_part
from pipeline.convert.target import (
    Share,
    check_places,
    claim,
    clean_up,
    find_finished,
    list_target,
    lock_target,
)
from pipeline.dataset.info import PLAN_FILE, DatasetInfo
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.formats.records import suffix_of
from pipeline.sources.choose import open_source
from pipeline.sources.listing import Listing
from pipeline.sources.names import pick, sample_keys
from pipeline.storage.uri import absolute


def convert(
    src: str,
    dst: str,
    settings: ConvertSettings | None = None,
    *,
    workers: int = 0,
    crew: Crew | None = None,
) -> DatasetInfo:
    """Make a dataset of a collection of images, or finish one that was begun.

    Args:
        src: What `open_source` knows; a path or a URI.
        dst: Folder of the shards; new, empty, or this conversion's own.
        settings: What to make.
        workers: Processes; 0 means the cores this process may use.
        crew: Who works, where it is not so many processes of this machine.

    Returns:
        What `dataset.json` says.

    Raises:
        ConfigError: The settings cannot work, or `dst` holds something else.
        DataError: No usable image.
        InfrastructureError: Reading or writing failed; the same call goes on later.
    """
    info = convert_share(src, dst, settings, crew=crew or Crew(workers=workers))
    if info is None:
        raise DataError(
            f"convert: shards have vanished from {storage.redact(dst)}. Run the same command again."
        )
    return info


def convert_share(
    src: str,
    dst: str,
    settings: ConvertSettings | None = None,
    *,
    share: Share | None = None,
    crew: Crew | None = None,
) -> DatasetInfo | None:
    """Make one share of a dataset's shards; whoever finds all of them made commits the dataset.

    Committing is idempotent: where two find that at the same time, both write the same bytes.

    Args:
        src: As for `convert`.
        dst: As for `convert`; one folder that all invocations see.
        settings: What to make; the same in all of them.
        share: Which shards; nothing means all.
        crew: Who works.

    Returns:
        What `dataset.json` says, or nothing where other invocations have shards to make.

    Raises:
        As `convert` does.
    """
    settings, share, crew = settings or ConvertSettings(), share or Share(), crew or Crew()
    check_places(src, dst)
    # A worker may have another working folder, as those of a Ray cluster do.
    src, dst = absolute(src), absolute(dst)
    warm_up(crew)
    listing = open_source(src, settings).listing()
    plan = make_plan(listing, settings)
    done = find_finished(dst, plan)
    if done is not None:
        say(
            f"convert: {dst} is finished already: {done.num_samples:,} images in "
            f"{done.num_shards:,} shards"
        )
        if storage.exists(
            storage.join(dst, PLAN_FILE)
        ):  # killed between the commit and cleaning up
            clean_up(dst)
        return done
    with lock_target(dst, share):
        try:
            claim(dst, plan, share)
            parts = _make_parts(listing, dst, plan, share, crew)
            if parts is None:
                return None
            info = commit(listing, dst, plan, parts)
        except MaelstromError:
            done = None if share.is_whole else find_finished(dst, plan)
            if done is None:
                raise
            return done  # another share's invocation has committed, and cleaned up under our feet
        clean_up(dst)
    return info


def _find_parts(dst: str, plan: Plan, shards: Iterable[int]) -> dict[int, Part]:
    """Return the parts of the shards that are finished."""
    identity = plan.identity()
    sizes = {file.name: file.size_bytes for file in list_target(dst)}
    found: dict[int, Part] = {}
    for shard in shards:
        stem = plan.shard_stem(shard)
        if f"{PARTS_FOLDER}/{stem}.parquet" in sizes:
            read = read_part(dst, stem, identity=identity, container=plan.settings.format)
            if read is None:
                continue
            part = read[0]
            size_bytes = 0 if part.file is None else part.file.size_bytes
            if size_bytes == sizes.get(stem + suffix_of(plan.settings.format), 0):
                found[shard] = part
    return found


def _make_parts(
    listing: Listing, dst: str, plan: Plan, share: Share, crew: Crew
) -> list[Part] | None:
    """Make every shard of the share that is not there yet; return all parts in order, or nothing
    where some lack."""
    identity = plan.identity()
    mine = [shard for shard in range(plan.num_shards) if shard in share]
    parts = _find_parts(dst, plan, mine)
    missing = [shard for shard in mine if shard not in parts]
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

    total = sum(int(plan.bounds[shard + 1] - plan.bounds[shard]) for shard in mine)
    with Progress(f"Converting to {storage.name_of(dst)}", total=total) as progress:
        for part in parts.values():
            progress.skip(part.num_images)
        for shard, part in make_shards(missing, task, crew, target=dst):
            parts[shard] = part
            progress.advance(part.num_images, size_bytes=part.read_bytes)
    parts |= _find_parts(
        dst, plan, (shard for shard in range(plan.num_shards) if shard not in share)
    )
    if len(parts) < plan.num_shards:
        say(
            f"convert: {len(mine):,} shards are made; {plan.num_shards - len(parts):,} of other "
            "--shards are not. "
            "Whichever is last writes dataset.json; so does any of these commands when it is run "
            "again."
        )
        return None
    return [parts[shard] for shard in range(plan.num_shards)]


def make_shards(
    shards: Sequence[int], task: Callable[[int], ShardTask], crew: Crew, *, target: str
) -> Iterator[tuple[int, Part]]:
    """Make shards and yield their parts as they are finished.

    Args:
        shards: Their numbers.
        task: Tells what a shard is made of; called as work is handed out.
        crew: Who works.
        target: Where the shards go.

    Raises:
        InfrastructureError: A worker was killed, or kept failing.
    """
    if not shards:
        return iter(())
    if crew.engine == "ray":
        if target.startswith("memory:"):
            raise ConfigError(
                "convert: memory:// is of one process; Ray's workers cannot write there."
            )
        return _in_ray(shards, task, crew)
    workers = min(crew.workers or cores(), len(shards))
    if workers == 1 or target.startswith("memory:"):
        return ((shard, make_shard(task(shard))) for shard in shards)
    return _in_processes(shards, task, workers)
