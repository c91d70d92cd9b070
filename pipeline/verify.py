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
from pipeline.dataset.shard_checks import Problem, check_shard, find_undecodable
from pipeline.errors import ConfigError, DataError
from pipeline.formats.records import EmptyShardError
from pipeline.options import Location

_THREADS = 8
_MOST_ZEROS_BYTES = 2**20
"""Largest archive that is looked at for members, if dataset.json does not list it."""


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
        problems = []
        for problem in self.problems:
            problems.append(
                {
                    "shard": problem.shard,
                    "key": problem.key,
                    "problem": problem.problem,
                }
            )
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
    chosen = None
    folder = uri
    if is_selection(uri):
        chosen = list_shards(uri)
        folder = chosen.folder
    if not _is_ours(folder):
        found = chosen or list_shards(uri)
        return _verify_foreign(found, full=full)
    dataset = open_dataset(uri)
    # Shards that were chosen by name and that dataset.json does not know are scanned, like others.
    was_scanned = dataset.info.made_by.get("tool") == "scan"
    if was_scanned and chosen is not None:
        return _verify_foreign(chosen, full=full)
    is_whole = chosen is None
    return _verify_dataset(dataset, full=full, is_whole=is_whole)


def _is_ours(folder: str) -> bool:
    """Tell whether a folder holds a dataset that was made here, finished or not."""
    # An unfinished conversion has shards, too: opening it says that it is unfinished.
    for name in (DATASET_FILE, PLAN_FILE):
        path = storage.join(folder, name)
        if storage.exists(path):
            return True
    return False


def _verify_dataset(manifest: Manifest, *, full: bool, is_whole: bool) -> VerifyResult:
    info = manifest.info
    result = VerifyResult(info.num_samples, info.num_shards)
    files = storage.list_files(manifest.uri)
    present = {file.name: file.size_bytes for file in files}
    # A selection leaves the others out on purpose.
    if is_whole:
        _find_unlisted(manifest, present, result)

    def check(s: int) -> list[Problem]:
        return check_shard(manifest, s, present, full=full)

    for problems in _each_shard(check, manifest):
        result.problems.extend(problems)
    if full:
        repeated = _repeated_keys(manifest)
        result.problems.extend(repeated)
    return result


def _find_unlisted(
    manifest: Manifest, present: dict[str, int], result: VerifyResult
) -> None:
    """Report shards in the folder that dataset.json does not list; empty archives are no loss."""
    listed = set(manifest.info.shards.columns["name"])
    for name in sorted(present):
        if name in listed or storage.is_hidden(name):
            continue
        # Other files may lie there: a page about the data, DALI's indexes.
        if container_of(name) != manifest.info.format:
            continue
        # --write-manifest left an empty archive out with a warning: it is no problem afterwards.
        uri = storage.join(manifest.uri, name)
        if _is_empty_archive(uri, present[name]):
            _ignore(result, EMPTY_ARCHIVE)
        else:
            problem = Problem(name, "", f"not in {DATASET_FILE}")
            result.problems.append(problem)


def _ignore(result: VerifyResult, reason: str, count: int = 1) -> None:
    """Count what was skipped for a reason."""
    before = result.ignored.get(reason, 0)
    result.ignored[reason] = before + count


def _each_shard(
    check: Callable[[int], list[Problem]], manifest: Manifest
) -> Iterator[list[Problem]]:
    """Run a check on every shard, several at a time, and yield the problems in order."""
    # A local disk feeds a thread per core; a store answers more requests than there are cores.
    workers = _THREADS
    if storage.is_local(manifest.uri):
        cores = os.cpu_count() or 1
        workers = min(_THREADS, cores)
    sizes = manifest.shard_sizes.tolist()
    dataset_name = storage.name_of(manifest.uri)
    label = f"Verifying {dataset_name}"
    with (
        Progress(label, total=manifest.info.num_samples) as progress,
        ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool,
    ):
        numbers = range(manifest.info.num_shards)
        checked = pool.map(check, numbers)
        for s, problems in enumerate(checked):
            size_bytes = manifest.shard_bytes(s)
            progress.advance(sizes[s], size_bytes=size_bytes)
            yield problems


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
                other = manifest.shard_name(first)
                text = f"the key is also in {other}"
                yield Problem(manifest.shard_name(s), key, text)


def _is_empty_archive(uri: str, size_bytes: int) -> bool:
    """Tell whether a tar has no member: only the zeros that end an archive."""
    if not 0 < size_bytes <= _MOST_ZEROS_BYTES:
        return False
    data = storage.read_bytes(uri)
    return data.count(0) == len(data)


def _verify_foreign(found: ShardFiles, *, full: bool) -> VerifyResult:
    result = VerifyResult()
    scanned = scan(found.folder, found.files)
    has_others = len(found.files) > 1
    for file, shard in zip(found.files, scanned, strict=True):
        # An archive without a member is left out among others; alone it is the dataset.
        if isinstance(shard, EmptyShardError) and has_others:
            _ignore(result, EMPTY_ARCHIVE)
            continue
        result.num_shards += 1
        if isinstance(shard, DataError):
            damaged = Problem(file.name, "", str(shard))
            result.problems.append(damaged)
            continue
        result.num_samples += len(shard.table)
        for reason, count in shard.ignored.items():
            _ignore(result, reason, count)
        if full:
            problems = list(find_undecodable(file.uri, file.name, shard))
        else:
            # What the scan has seen of the headers.
            problems = [
                Problem(file.name, key, str(refused)) for key, refused in shard.bad
            ]
        result.problems.extend(problems)
    if found.files and not result.num_shards:
        all_empty = Problem("", "", "all archives are empty")
        result.problems.append(all_empty)
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
    problems = [Problem(name, key, str(refused)) for name, key, refused in written.bad]
    info = written.info
    return VerifyResult(
        num_samples=info.num_samples,
        num_shards=info.num_shards,
        problems=problems,
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
    shown = result.problems[:_MOST_SHOWN]
    for problem in shown:
        location = problem.shard
        if problem.key:
            location = f"{problem.shard}:{problem.key}"
        say(f"{location}: {problem.problem}")
    num_hidden = len(result.problems) - _MOST_SHOWN
    if num_hidden > 0:
        say(f"... and {num_hidden:,} more; --json lists all")
    for reason, count in result.ignored.items():
        say(f"note: {count:,} skipped: {reason}")
    verdict = "no problem found"
    if result.problems:
        num_problems = len(result.problems)
        verdict = f"{num_problems:,} problems"
    size = f"{result.num_samples:,} samples in {result.num_shards:,} shards"
    say(f"verify: {size}: {verdict}")


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
