"""Check a dataset: `python -m pipeline.verify URI`.

Fast by default: counts, sizes and the index against each other. `--full` reads every byte: sha256
of every shard, the shard's structure, the hash of every image, and decodes it. Shards made
elsewhere are always read whole: they have no manifest to be compared with.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.verify")

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro

from pipeline import storage
from pipeline.console import Progress, run_command, say, say_json
from pipeline.dataset import Manifest, open_dataset
from pipeline.dataset.in_place import index_in_place
from pipeline.dataset.info import DATASET_FILE, PLAN_FILE
from pipeline.dataset.scan import (
    EMPTY_ARCHIVE,
    ShardFiles,
    container_of,
    is_selection,
    list_shards,
    scan,
)
from pipeline.errors import ConfigError, DataError
from pipeline.formats.index import index_shard
from pipeline.formats.records import EmptyShardError, ShardIndex
from pipeline.formats.table import FORMATS, ShardTable
from pipeline.images.decodable import undecodable
from pipeline.options import Location

_THREADS = 8
_MOST_ZEROS_BYTES = 2**20
"""Largest archive that is looked at for members, if dataset.json does not list it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Args:
        shard: File it is in; empty if it concerns the whole dataset.
        key: Sample it concerns, or empty.
        problem: What is wrong.
    """

    shard: str
    key: str
    problem: str


@dataclass
class VerifyResult:
    """What was found.

    Args:
        num_samples: Samples of the dataset, or of its readable shards.
        num_shards: Shards of the dataset.
        problems: Everything that is wrong.
        ignored: Members of the shards that were skipped, counted by reason.
    """

    num_samples: int = 0
    num_shards: int = 0
    problems: list[Problem] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        problems = [
            {"shard": problem.shard, "key": problem.key, "problem": problem.problem}
            for problem in self.problems
        ]
        return {
            "num_samples": self.num_samples,
            "num_shards": self.num_shards,
            "problems": problems,
        }


def verify(uri: str, *, full: bool = False) -> VerifyResult:
    """Check a dataset and return what is wrong with it.

    Args:
        uri: Folder of the dataset.
        full: Read and decode everything.

    Raises:
        DataError: There is no dataset, it is unfinished, or `dataset.json` cannot be read.
        InfrastructureError: The storage failed.
    """
    chosen = list_shards(uri) if is_selection(uri) else None
    folder = uri if chosen is None else chosen.folder
    # An unfinished conversion has shards, too: opening it says that it is unfinished.
    is_ours = any(storage.exists(storage.join(folder, name)) for name in (DATASET_FILE, PLAN_FILE))
    if not is_ours:
        return _verify_foreign(chosen or list_shards(uri), full=full)
    dataset = open_dataset(uri)
    # Shards that were chosen by name and that dataset.json does not know are scanned, like others.
    if dataset.info.made_by.get("tool") == "scan" and chosen is not None:
        return _verify_foreign(chosen, full=full)
    return _verify_dataset(dataset, full=full, is_whole=chosen is None)


def _verify_dataset(manifest: Manifest, *, full: bool, is_whole: bool) -> VerifyResult:
    info = manifest.info
    result = VerifyResult(info.num_samples, info.num_shards)
    present = {file.name: file.size_bytes for file in storage.list_files(manifest.uri)}
    listed = set(info.shards.columns["name"])
    for name in sorted(present) if is_whole else []:
        is_shard = container_of(name) == info.format and not storage.is_hidden(name)
        if not is_shard or name in listed:
            continue
        # --write-manifest left an empty archive out with a warning: it is no problem afterwards.
        if _is_empty_archive(storage.join(manifest.uri, name), present[name]):
            result.ignored[EMPTY_ARCHIVE] = result.ignored.get(EMPTY_ARCHIVE, 0) + 1
        else:
            result.problems.append(Problem(name, "", f"not in {DATASET_FILE}"))

    def check(s: int) -> list[Problem]:
        return _verify_shard(manifest, s, present, full=full)

    for problems in _each_shard(check, manifest):
        result.problems.extend(problems)
    if full:
        result.problems.extend(_repeated_keys(manifest))
    return result


def _each_shard(
    check: Callable[[int], list[Problem]], manifest: Manifest
) -> Iterator[list[Problem]]:
    """Run a check on every shard, several at a time, and yield the problems in order."""
    # A local disk feeds a thread per core; a store answers more requests than there are cores.
    workers = _THREADS
    if storage.is_local(manifest.uri):
        workers = min(_THREADS, os.cpu_count() or 1)
    sizes = manifest.shard_sizes.tolist()
    label = f"Verifying {storage.name_of(manifest.uri)}"
    with (
        Progress(label, total=manifest.info.num_samples) as progress,
        ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool,
    ):
        for s, problems in enumerate(pool.map(check, range(manifest.info.num_shards))):
            progress.advance(sizes[s], size_bytes=manifest.shard_bytes(s))
            yield problems


def _verify_shard(
    manifest: Manifest, s: int, present: dict[str, int], *, full: bool
) -> list[Problem]:
    name = manifest.shard_name(s)
    expected = manifest.info.shards[s]
    if name not in present:
        return [Problem(name, "", "missing")]
    problems = []
    if present[name] != expected.size_bytes:
        problems.append(
            Problem(name, "", f"{present[name]} bytes, {DATASET_FILE} says {expected.size_bytes}")
        )
    try:
        table = manifest.shard_table(s)
        problems.extend(_inconsistent(name, table, expected.size_bytes))
        if table.content_hash() != expected.content_hash:
            problems.append(
                Problem(
                    name, "", f"the manifest's rows have not the content hash in {DATASET_FILE}"
                )
            )
    except DataError as error:
        return [*problems, Problem(name, "", str(error))]
    if full:
        problems.extend(_verify_bytes(manifest, s, table))
    return problems


def _inconsistent(name: str, table: ShardTable, size_bytes: int) -> Iterator[Problem]:
    """Find rows that cannot be true: outside the file, on top of each other."""
    ends = table.offsets + table.sizes
    outside = (table.offsets < 0) | (table.sizes < 0) | (ends > size_bytes)
    for row in np.flatnonzero(outside).tolist():
        yield Problem(
            name, table.keys[row], f"bytes {table.offsets[row]} to {ends[row]} lie outside the file"
        )
    # By offset, not by row: FFCV's workers write a beton's pages out of order.
    order = np.argsort(table.offsets, kind="stable")
    starts = table.offsets[order]
    # Links in a foreign tar share the bytes of one member: the same place, not a part of it.
    is_same = (starts[1:] == starts[:-1]) & (np.diff(table.sizes[order]) == 0)
    overlaps = (starts[1:] < ends[order][:-1]) & ~is_same
    for row in order[1:][overlaps].tolist():
        yield Problem(name, table.keys[row], "lies on top of the sample before it")


def _verify_bytes(manifest: Manifest, s: int, table: ShardTable) -> list[Problem]:
    name = manifest.shard_name(s)
    try:
        component = manifest.info.made_by.get("image_component")
        index = index_shard(manifest.shard_uri(s), image_component=component)
    except DataError as error:
        return [Problem(name, "", str(error))]
    problems = []
    if index.file.sha256 != manifest.shard_sha256(s):
        problems.append(
            Problem(
                name,
                "",
                f"sha256 is {index.file.sha256}, {DATASET_FILE} says {manifest.shard_sha256(s)}",
            )
        )
    problems.extend(_different(name, table, index.table))
    problems.extend(_undecodable(manifest.shard_uri(s), name, index))
    return problems


def _different(name: str, said: ShardTable, found: ShardTable) -> Iterator[Problem]:
    """Compare the manifest's rows with the file's."""
    if said.keys != found.keys:
        missing = set(said.keys) - set(found.keys)
        yield Problem(
            name,
            "",
            f"{len(found)} samples in the file, {len(said)} in the manifest; missing "
            f"{sorted(missing)[:5]}",
        )
        return
    for column, what in (
        ("hashes", "the image's bytes are not those the manifest knows (xxh3)"),
        ("offsets", "the image lies elsewhere than the manifest says"),
        ("sizes", "the image's size is not that in the manifest"),
        ("labels", "the label is not that in the manifest"),
        ("widths", "the width is not that in the manifest"),
        ("heights", "the height is not that in the manifest"),
    ):
        for row in np.flatnonzero(getattr(said, column) != getattr(found, column)).tolist():
            yield Problem(name, said.keys[row], what)


def _undecodable(uri: str, name: str, index: ShardIndex) -> Iterator[Problem]:
    table = index.table
    reasons = dict(index.bad)
    with storage.open_read(uri) as file:
        for row, key in enumerate(table.keys):
            if key in reasons:
                yield Problem(name, key, str(reasons[key]))
                continue
            if FORMATS[table.formats[row]] == "raw":
                # Bare pixels: their count was checked with the index; there is nothing to decode.
                continue
            file.seek(int(table.offsets[row]))
            if refused := undecodable(file.read(int(table.sizes[row]))):
                yield Problem(name, key, str(refused))


def _repeated_keys(manifest: Manifest) -> Iterator[Problem]:
    """Find keys that two shards share: readers that go by key would mix them up."""
    seen: dict[bytes, int] = {}
    for s in range(manifest.info.num_shards):
        try:
            keys = manifest.shard_table(s).keys
        except DataError:
            continue  # reported by the check of this shard
        for key in keys:
            first = seen.setdefault(key.encode(), s)
            if first != s:
                yield Problem(
                    manifest.shard_name(s), key, f"the key is also in {manifest.shard_name(first)}"
                )


def _is_empty_archive(uri: str, size_bytes: int) -> bool:
    """Tell whether a tar has no member: only the zeros that end an archive."""
    if not 0 < size_bytes <= _MOST_ZEROS_BYTES:
        return False
    data = storage.read_bytes(uri)
    return data.count(0) == len(data)


def _verify_foreign(found: ShardFiles, *, full: bool) -> VerifyResult:
    result = VerifyResult()
    for file, shard in zip(found.files, scan(found.folder, found.files), strict=True):
        result.num_shards += 1
        is_empty_one = isinstance(shard, EmptyShardError) and len(found.files) > 1
        if is_empty_one:
            result.num_shards -= 1
            result.ignored[EMPTY_ARCHIVE] = result.ignored.get(EMPTY_ARCHIVE, 0) + 1
            continue
        if isinstance(shard, DataError):
            result.problems.append(Problem(file.name, "", str(shard)))
            continue
        result.num_samples += len(shard.table)
        for reason, count in shard.ignored.items():
            result.ignored[reason] = result.ignored.get(reason, 0) + count
        problems = (
            list(_undecodable(file.uri, file.name, shard))
            if full
            else [Problem(file.name, key, str(refused)) for key, refused in shard.bad]
        )
        result.problems.extend(problems)
    if found.files and not result.num_shards:
        result.problems.append(Problem("", "", "all archives are empty"))
    return result


def write_manifest(uri: str, *, image_component: str | None = None) -> VerifyResult:
    """Index a folder of shards and write `manifest.parquet`, `dataset.json` and, for tars, DALI's
    indexes beside them.

    Images that cannot be read keep their place, marked, and count as problems; a damaged shard is
    an error.

    Args:
        uri: The folder, or a pattern that names all shards in it.
        image_component: Member of a sample that is its image, such as `image.jpg`.

    Raises:
        ConfigError: There is a dataset, or an unfinished conversion, already; or other shards.
        DataError: A shard is damaged.
        InfrastructureError: The folder cannot be written.
    """
    written = index_in_place(uri, image_component=image_component)
    return VerifyResult(
        num_samples=written.info.num_samples,
        num_shards=written.info.num_shards,
        problems=[Problem(name, key, str(refused)) for name, key, refused in written.bad],
        ignored=dict(written.left_out.counts),
    )


@dataclass(frozen=True)
class Arguments:
    """Check a dataset. Exit code 0: no problem found; 3: at least one problem."""

    uri: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="URI")]
    """Folder of the dataset: a path, s3://, gs:// or az://; or some of its shards, as a pattern in
    quotes such as 'data/train-*.tar' or 'data/train-{0000..0003}.tar', or a list with commas."""
    full: bool = False
    """Read every byte: check the sha256 of every shard and the hash of every image, and decode it.
    Takes about one core-minute per 30,000 photographs."""
    json: bool = False
    """Write the result to stdout as JSON: num_samples, num_shards, problems."""
    write_manifest: bool = False
    """Index shards that were made elsewhere, and write manifest.parquet and dataset.json next to
    them."""
    image_component: str | None = None
    """With --write-manifest: member of a sample that is its image, for example image.jpg or 1.jpg.
    None: jpg, jpeg, png or webp."""


_MOST_SHOWN = 20
"""Problems that are listed for a person."""


def _run(arguments: Arguments) -> int:
    """Do what the command line asks for and return the exit code."""
    if arguments.image_component is not None and not arguments.write_manifest:
        raise ConfigError("verify: --image-component needs --write-manifest.")
    try:
        if arguments.write_manifest:
            component = arguments.image_component
            result = write_manifest(arguments.uri, image_component=component)
        else:
            result = verify(arguments.uri, full=arguments.full)
    except DataError as error:
        if not arguments.json:
            raise
        # A program that reads the answer gets one object, whatever is wrong.
        result = VerifyResult(problems=[Problem("", "", str(error))])
    if arguments.json:
        say_json(result.to_json())
    else:
        _say(result)
    return DataError.exit_code if result.problems else 0


def _say(result: VerifyResult) -> None:
    """Write the result for a person."""
    for problem in result.problems[:_MOST_SHOWN]:
        location = f"{problem.shard}:{problem.key}" if problem.key else problem.shard
        say(f"{location}: {problem.problem}")
    num_hidden = len(result.problems) - _MOST_SHOWN
    if num_hidden > 0:
        say(f"... and {num_hidden:,} more; --json lists all")
    for reason, count in result.ignored.items():
        say(f"note: {count:,} skipped: {reason}")
    verdict = f"{len(result.problems):,} problems" if result.problems else "no problem found"
    say(f"verify: {result.num_samples:,} samples in {result.num_shards:,} shards: {verdict}")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(
        _run,
        Arguments,
        args,
        module="pipeline.verify",
        interrupted=(
            "verify: stopped. The shards were not changed: run the same command again to start "
            "over."
        ),
    )
