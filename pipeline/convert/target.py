"""The folder a conversion writes to: whose it is, whether it is finished, and leaving nothing
behind."""

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
from pipeline.dataset.info import DATASET_FILE, PLAN_FILE, DatasetInfo, parse_dataset_info
from pipeline.errors import ConfigError
from pipeline.storage.local import TMP_MARK
from pipeline.storage.retry import explain

_LOCK_FILE = "_lock"
_SHARE_LOCK = re.compile(r"_lock-\d+-of-\d+")
_WAIT_FOR_SIBLINGS_S = 5.0


@dataclass(frozen=True)
class Share:
    """Which shards one of several invocations makes: every `count`-th, from `index` on."""

    index: int = 0
    count: int = 1

    def __contains__(self, shard: object) -> bool:
        return isinstance(shard, int) and shard % self.count == self.index

    @property
    def is_whole(self) -> bool:
        """Return whether these are all shards."""
        return self.count == 1

    @property
    def lock_file(self) -> str:
        """Return the name of the lock that this share's invocation holds."""
        return _LOCK_FILE if self.is_whole else f"{_LOCK_FILE}-{self.index}-of-{self.count}"


def parse_share(text: str) -> Share:
    """Read `I/N`, with I from 0 to N - 1.

    Raises:
        ConfigError: It is something else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not found or not int(found[1]) < int(found[2]):
        raise ConfigError(
            f"convert: --shards {text!r}: write I/N with I from 0 to N - 1, such as 0/16; in a "
            "Slurm array of 0-15 "
            "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT."
        )
    return Share(int(found[1]), int(found[2]))


def check_places(src: str, dst: str) -> None:
    """Refuse a target that is a file or lies in the source.

    Raises:
        ConfigError: It is.
    """
    if not (storage.is_local(src) and storage.is_local(dst)):
        inside = storage.join(dst, "").startswith(storage.join(src, "") + "/") or src.rstrip(
            "/"
        ) == dst.rstrip("/")
    else:
        source, target = storage.local_path(src).resolve(), storage.local_path(dst).resolve()
        inside = target == source or source in target.parents
        if target.exists() and not target.is_dir():
            raise ConfigError(f"convert: {dst} is a file. Give a folder for the shards.")
    if inside:
        raise ConfigError(
            f"convert: {storage.redact(dst)} lies in the source {storage.redact(src)}. Choose "
            "another folder."
        )


def find_finished(dst: str, plan: Plan) -> DatasetInfo | None:
    """Return the dataset where this conversion has been finished before.

    Raises:
        ConfigError: Another dataset is there.
    """
    uri = storage.join(dst, DATASET_FILE)
    if not storage.exists(uri):
        return None
    info = parse_dataset_info(storage.read_bytes(uri), where=f"dataset: {storage.redact(uri)}")
    if info.made_by.get("plan") != plan.describe():
        raise ConfigError(
            f"convert: {storage.redact(dst)} already holds a finished dataset made otherwise "
            f"({_differences(info.made_by.get('plan'), plan)}). Choose another folder, or remove "
            "that one."
        )
    return info


def _differences(other: Any, plan: Plan) -> str:
    """Return what another plan says differently, for an error message."""
    mine = plan.describe()
    if not isinstance(other, dict):
        return "by another tool"
    flat_mine = {**mine.pop("settings"), **mine}
    flat_other = {**(other.get("settings") or {}), **other}
    changed = [key for key, value in flat_mine.items() if flat_other.get(key) != value]
    found = [f"{key} was {flat_other.get(key)!r}, is {flat_mine[key]!r}" for key in changed]
    return "; ".join(found[:5]) or "in its layout"


@contextmanager
def lock_target(dst: str, share: Share) -> Iterator[None]:
    """Lock a local target: two conversions of the same shards would undo each other's work.

    Shares hold a lock each; one that makes everything waits for none of them, and they not for it.
    """
    if not storage.is_local(dst):
        yield
        return
    storage.make_folder(dst)
    folder = storage.local_path(dst)
    taken = f"convert: another conversion is writing to {dst}. Wait for it, or stop it."
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / share.lock_file, blocking=False))
            if share.is_whole:
                others = [path for path in folder.iterdir() if _SHARE_LOCK.fullmatch(path.name)]
            else:
                others = [folder / _LOCK_FILE]
            for path in others:
                # Siblings look in the same moment, and hold it no longer than that.
                with FileLock(path, timeout=0 if share.is_whole else _WAIT_FOR_SIBLINGS_S):
                    pass
        except Timeout:
            raise ConfigError(taken) from None
        except OSError as error:
            raise explain("write", str(folder / share.lock_file), error) from error
        yield


def claim(dst: str, plan: Plan, share: Share) -> None:
    """Mark the target as this conversion's; refuse one that is somebody else's.

    Raises:
        ConfigError: The folder holds other files, or a conversion with other settings.
    """
    uri = storage.join(dst, PLAN_FILE)
    if storage.put_if_absent(uri, plan.to_json()):
        foreign = [file.name for file in list_target(dst) if not _is_own(file.name)]
        if foreign:
            storage.delete(uri)
            _remove_locks(dst)
            raise ConfigError(
                f"convert: {storage.redact(dst)} is not empty and holds no conversion (there is "
                f"{foreign[0]!r}). "
                "Choose a new or empty folder; nothing was changed."
            )
        return
    text = storage.read_bytes(uri)
    if text == plan.to_json():
        if share.is_whole:
            say(f"convert: going on with the conversion in {dst}")
        _remove_unfinished(dst, share)
        return
    try:
        other = json.loads(text)
    except ValueError:
        other = None
    raise ConfigError(
        f"convert: {storage.redact(dst)} holds an unfinished conversion made otherwise "
        f"({_differences(other, plan)}). "
        "Run it with its own settings and source, choose another folder, or remove that one."
    )


def list_target(dst: str) -> Iterator[storage.FileInfo]:
    """Yield all files of the target."""
    return storage.list_files(dst, recursive=True)


def _is_own(name: str) -> bool:
    return name in (PLAN_FILE, _LOCK_FILE) or bool(_SHARE_LOCK.fullmatch(name)) or TMP_MARK in name


def _remove_unfinished(dst: str, share: Share) -> None:
    """Remove the temporary files of a run that was killed: those of shards that no other run can be
    writing."""
    if not storage.is_local(dst):
        return
    for file in list(list_target(dst)):
        shard = re.search(rf"-(\d+)\.\w+{re.escape(TMP_MARK)}", file.name)
        if TMP_MARK in file.name and (share.is_whole or (shard and int(shard[1]) in share)):
            storage.delete(file.uri)


def _remove_locks(dst: str) -> None:
    if storage.is_local(dst):
        for file in list(storage.list_files(dst)):
            if file.name == _LOCK_FILE or _SHARE_LOCK.fullmatch(file.name):
                storage.delete(file.uri)


def clean_up(dst: str) -> None:
    """Remove what only an unfinished conversion needs; the marker goes last. Two may do this at the
    same time."""
    for file in list(list_target(dst)):
        if file.name.startswith(f"{PARTS_FOLDER}/") or TMP_MARK in file.name:
            storage.delete(file.uri)
    storage.delete(storage.join(dst, PLAN_FILE))
    if storage.is_local(dst):
        with suppress(OSError):
            (storage.local_path(dst) / PARTS_FOLDER).rmdir()
        _remove_locks(dst)
