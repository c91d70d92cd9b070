"""The folder a conversion writes to: whose it is, whether it is finished, and leaving nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from filelock import FileLock, Timeout

from pipeline import storage
from pipeline.command import say
from pipeline.convert_plan import Plan
from pipeline.convert_task import PARTS_FOLDER
from pipeline.dataset_info import DATASET_FILE, DatasetInfo, parse_dataset_info
from pipeline.errors import ConfigError
from pipeline.local_files import TMP_MARK
from pipeline.manifest import PLAN_FILE
from pipeline.retry import explain

_LOCK_FILE = "_lock"
_OWN_FILES = (PLAN_FILE, _LOCK_FILE)


def check_places(src: str, dst: str) -> None:
    """Refuse a target that is a file or lies in the source.

    Raises:
        ConfigError: It is.
    """
    if not (storage.is_local(src) and storage.is_local(dst)):
        inside = storage.join(dst, "").startswith(storage.join(src, "") + "/") or src.rstrip("/") == dst.rstrip("/")
    else:
        source, target = storage.local_path(src).resolve(), storage.local_path(dst).resolve()
        inside = target == source or source in target.parents
        if target.exists() and not target.is_dir():
            raise ConfigError(f"convert: {dst} is a file. Give a folder for the shards.")
    if inside:
        raise ConfigError(
            f"convert: {storage.redact(dst)} lies in the source {storage.redact(src)}. Choose another folder."
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
            f"({_differences(info.made_by.get('plan'), plan)}). Choose another folder, or remove that one."
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


def lock_target(dst: str) -> AbstractContextManager[Any]:
    """Return a lock on a local target: two conversions into one folder would undo each other's work."""
    if not storage.is_local(dst):
        return nullcontext()
    storage.make_folder(dst)
    path = storage.local_path(dst) / _LOCK_FILE
    lock = FileLock(path, blocking=False)
    try:
        return lock.acquire()
    except Timeout:
        raise ConfigError(f"convert: another conversion is writing to {dst}. Wait for it, or stop it.") from None
    except OSError as error:
        raise explain("write", str(path), error) from error


def claim(dst: str, plan: Plan) -> None:
    """Mark the target as this conversion's; refuse one that is somebody else's.

    Raises:
        ConfigError: The folder holds other files, or a conversion with other settings.
    """
    uri = storage.join(dst, PLAN_FILE)
    if storage.put_if_absent(uri, plan.to_json()):
        foreign = [file.name for file in list_target(dst) if file.name not in _OWN_FILES and TMP_MARK not in file.name]
        if foreign:
            storage.delete(uri)
            _removelock_target(dst)
            raise ConfigError(
                f"convert: {storage.redact(dst)} is not empty and holds no conversion (there is {foreign[0]!r}). "
                "Choose a new or empty folder; nothing was changed."
            )
        return
    text = storage.read_bytes(uri)
    if text == plan.to_json():
        say(f"convert: going on with the conversion in {dst}")
        _remove_unfinished(dst)
        return
    try:
        other = json.loads(text)
    except ValueError:
        other = None
    raise ConfigError(
        f"convert: {storage.redact(dst)} holds an unfinished conversion made otherwise ({_differences(other, plan)}). "
        "Run it with its own settings and source, choose another folder, or remove that one."
    )


def list_target(dst: str) -> Iterator[storage.FileInfo]:
    """Yield all files of the target."""
    return storage.list_files(dst, recursive=True)


def _remove_unfinished(dst: str) -> None:
    """Remove the temporary files of a run that was killed; no other run can be writing, for this one has the lock."""
    if storage.is_local(dst):
        for file in list(list_target(dst)):
            if TMP_MARK in file.name:
                storage.delete(file.uri)


def _removelock_target(dst: str) -> None:
    if storage.is_local(dst):
        storage.delete(storage.join(dst, _LOCK_FILE))


def clean_up(dst: str) -> None:
    """Remove what only an unfinished conversion needs; the marker goes last."""
    for file in list(list_target(dst)):
        if file.name.startswith(f"{PARTS_FOLDER}/"):
            storage.delete(file.uri)
    storage.delete(storage.join(dst, PLAN_FILE))
    if storage.is_local(dst):
        parts = storage.local_path(dst) / PARTS_FOLDER
        if parts.is_dir() and not any(parts.iterdir()):
            parts.rmdir()
        _removelock_target(dst)
