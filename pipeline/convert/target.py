"""The folder a conversion writes to: whose it is, whether it is finished, and leaving no litter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from pipeline import storage
from pipeline.console import say
from pipeline.convert.plan import Plan
from pipeline.convert.shard import PARTS_FOLDER
from pipeline.dataset.info import (
    DATASET_FILE,
    PLAN_FILE,
    DatasetInfo,
    parse_dataset_info,
)
from pipeline.errors import ConfigError
from pipeline.storage.local import TMP_MARK
from pipeline.storage.retry import explain

_LOCK_FILE = "_lock"
_JOB_LOCK = re.compile(r"_lock-\d+-of-\d+")
_WAIT_FOR_OTHER_JOBS_S = 5.0


@dataclass(frozen=True)
class Job:
    """One job of an array: makes every `count`-th shard, from `index` on. By default all shards."""

    index: int = 0
    count: int = 1

    def __contains__(self, shard: object) -> bool:
        return isinstance(shard, int) and shard % self.count == self.index

    @property
    def is_alone(self) -> bool:
        """Return whether this job makes all shards."""
        return self.count == 1

    @property
    def lock_file(self) -> str:
        """Return the name of the lock that this job holds."""
        return (
            _LOCK_FILE
            if self.is_alone
            else f"{_LOCK_FILE}-{self.index}-of-{self.count}"
        )


def parse_job(text: str) -> Job:
    """Read `I/N`, with I from 0 to N - 1.

    Raises:
        ConfigError: The text is something else.
    """
    numbers = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not numbers or not int(numbers[1]) < int(numbers[2]):
        raise ConfigError(
            f"convert: --shards {text!r}: expected I/N with I from 0 to N - 1, for example 0/16. "
            "In a Slurm array of 0-15 write $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT."
        )
    return Job(int(numbers[1]), int(numbers[2]))


def check_target(src: str, dst: str) -> None:
    """Refuse a target that is a file or lies in the source.

    Raises:
        ConfigError: It is one of these.
    """
    if storage.is_local(src) and storage.is_local(dst):
        # Resolved: a link or `..` must not hide that one lies in the other.
        source = storage.local_path(src).resolve()
        target = storage.local_path(dst).resolve()
        if target.exists() and not target.is_dir():
            raise ConfigError(
                f"convert: {dst} is a file. Give a folder for the shards."
            )
        is_inside = target == source or source in target.parents
    else:
        is_same = src.rstrip("/") == dst.rstrip("/")
        is_inside = is_same or storage.join(dst, "").startswith(
            storage.join(src, "") + "/"
        )
    if is_inside:
        raise ConfigError(
            f"convert: {storage.redact(dst)} lies in the source {storage.redact(src)}. Choose "
            "another folder."
        )


def find_finished(dst: str, plan: Plan) -> DatasetInfo | None:
    """Return the dataset if this conversion was finished before; None if there is none yet.

    Raises:
        ConfigError: The folder holds another dataset.
    """
    uri = storage.join(dst, DATASET_FILE)
    if not storage.exists(uri):
        return None
    info = parse_dataset_info(
        storage.read_bytes(uri), where=f"dataset: {storage.redact(uri)}"
    )
    if info.made_by.get("plan") != plan.describe():
        raise ConfigError(
            f"convert: {storage.redact(dst)} already holds a finished dataset with other settings "
            f"({_differences(info.made_by.get('plan'), plan)}). Choose another folder, or remove "
            "that one."
        )
    return info


def _differences(other: Any, plan: Plan) -> str:
    """Return in what another plan differs, for an error message."""
    mine = plan.describe()
    if not isinstance(other, dict):
        return "made by another tool"
    flat_mine = {**mine.pop("settings"), **mine}
    flat_other = {**(other.get("settings") or {}), **other}
    changed = [
        name for name, value in flat_mine.items() if flat_other.get(name) != value
    ]
    differences = [
        f"{name} was {flat_other.get(name)!r}, is {flat_mine[name]!r}"
        for name in changed
    ]
    return "; ".join(differences[:5]) or "another layout"


@contextmanager
def lock_target(dst: str, job: Job) -> Iterator[None]:
    """Lock a local target: two conversions of the same shards would undo each other's work.

    Each job of an array holds a lock of its own. A job that makes all shards and the jobs of an
    array exclude each other.

    Raises:
        ConfigError: Another conversion holds the lock.
        InfrastructureError: The lock cannot be written.
    """
    # Object storage has no locks; there, writing is idempotent and the same bytes win.
    if not storage.is_local(dst):
        yield
        return
    storage.make_folder(dst)
    folder = storage.local_path(dst)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / job.lock_file, blocking=False))
            if job.is_alone:
                others = [
                    path for path in folder.iterdir() if _JOB_LOCK.fullmatch(path.name)
                ]
                timeout_s = 0.0
            else:
                # Other jobs look at the same lock at the same moment, and hold it only that long.
                others = [folder / _LOCK_FILE]
                timeout_s = _WAIT_FOR_OTHER_JOBS_S
            for path in others:
                with FileLock(path, timeout=timeout_s):
                    pass
        except Timeout:
            raise ConfigError(
                f"convert: another conversion is writing to {dst}. Wait until it is done, or stop "
                "it."
            ) from None
        except OSError as error:
            raise explain(
                "write",
                str(folder / job.lock_file),
                error,
            ) from error
        yield


def claim(
    dst: str,
    plan: Plan,
    job: Job,
) -> None:
    """Mark the target as this conversion's; refuse one that is somebody else's.

    Raises:
        ConfigError: The folder holds other files, or a conversion with other settings.
    """
    uri = storage.join(dst, PLAN_FILE)
    # The plan goes first and decides: of two that start at once, one finds the other's plan.
    if storage.put_if_absent(uri, plan.to_json()):
        foreign = [file.name for file in list_target(dst) if not _is_own(file.name)]
        if foreign:
            storage.delete(uri)
            _remove_locks(dst)
            raise ConfigError(
                f"convert: {storage.redact(dst)} is not empty and holds no conversion (it holds "
                f"{foreign[0]!r}). Choose a new or empty folder. No file there was changed."
            )
        return

    text = storage.read_bytes(uri)
    if text == plan.to_json():
        if job.is_alone:
            say(f"convert: continuing the conversion in {dst}")
        _remove_unfinished(dst, job)
        return

    try:
        other = json.loads(text)
    except ValueError:
        other = None
    raise ConfigError(
        f"convert: {storage.redact(dst)} holds an unfinished conversion with other settings "
        f"({_differences(other, plan)}). Run it with its own settings and source, choose another "
        "folder, or remove that one."
    )


def list_target(dst: str) -> Iterator[storage.FileInfo]:
    """Yield all files of the target."""
    return storage.list_files(dst, recursive=True)


def _is_own(name: str) -> bool:
    is_lock = name == _LOCK_FILE or _JOB_LOCK.fullmatch(name) is not None
    # A file manager that looks into an empty folder leaves .DS_Store there: it is nobody's data.
    return is_lock or name == PLAN_FILE or TMP_MARK in name or storage.is_hidden(name)


def _remove_unfinished(dst: str, job: Job) -> None:
    """Remove the temporary files that a killed run left behind.

    Only those of this job's shards: another job may be writing the others right now.
    """
    if not storage.is_local(dst):
        return
    for file in list(list_target(dst)):
        if TMP_MARK not in file.name:
            continue
        shard = re.search(rf"-(\d+)\.\w+{re.escape(TMP_MARK)}", file.name)
        is_mine = job.is_alone or (shard is not None and int(shard[1]) in job)
        if is_mine:
            storage.delete(file.uri)


def _remove_locks(dst: str) -> None:
    if not storage.is_local(dst):
        return
    for file in list(storage.list_files(dst)):
        if file.name == _LOCK_FILE or _JOB_LOCK.fullmatch(file.name):
            storage.delete(file.uri)


def clean_up(dst: str) -> None:
    """Remove what only an unfinished conversion needs. Two may do this at the same time."""
    for file in list(list_target(dst)):
        if file.name.startswith(f"{PARTS_FOLDER}/") or TMP_MARK in file.name:
            storage.delete(file.uri)
    # The plan goes last: while it is there, a run that finds the dataset cleans up again.
    storage.delete(storage.join(dst, PLAN_FILE))
    if storage.is_local(dst):
        with suppress(OSError):
            (storage.local_path(dst) / PARTS_FOLDER).rmdir()
        _remove_locks(dst)
