"""Writes: atomic, conditional, deletes."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.storage.door import in_store, is_local, on_disk
from pipeline.storage.local import commit_file, put_local_if_absent, write_local
from pipeline.storage.uri import split_scheme


def make_folder(uri: str) -> None:
    """Make a local folder and its parents; object storage has none to make."""
    if is_local(uri):
        on_disk("write", uri, lambda path: path.mkdir(parents=True, exist_ok=True))


def write_atomic(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Local: a temporary name in the same folder, fsync, rename. Object storage: one PUT.
    """
    if is_local(uri):
        on_disk(
            "write",
            uri,
            lambda path: write_local(path, lambda file: file.write(data), commit_file),
        )
        return
    uri = split_scheme(uri)[1]
    in_store("write", uri, lambda fs: fs.pipe_file(uri, data))


def put_file(local: Path, uri: str) -> None:
    """Copy a local file to a URI, whole or not at all."""
    if is_local(uri):
        # By way of a temporary file: a copy that is stopped must leave no part of one.
        def copy(path: Path) -> None:
            with local.open("rb") as source:
                write_local(
                    path,
                    lambda file: shutil.copyfileobj(source, file, 2**20),
                    commit_file,
                )

        on_disk("write", uri, copy)
        return
    uri = split_scheme(uri)[1]
    in_store("write", uri, lambda fs: fs.put_file(str(local), uri))


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write a file only if there is none; return whether this call wrote it.

    The whole content appears at once: locally by a hard link (which fails if the name is taken),
    in object storage by a conditional PUT.
    """
    # Leases and checkpoints rely on it: of many processes exactly one is told that it wrote.
    if is_local(uri):
        return on_disk("write", uri, lambda path: put_local_if_absent(path, data))
    uri = split_scheme(uri)[1]
    attempts = 0

    def put(fs: Any) -> bool:
        nonlocal attempts
        attempts += 1
        try:
            fs.pipe_file(uri, data, mode="create")
        except FileExistsError:
            # A PUT that was answered too late has been retried: what is there may be ours.
            return attempts > 1 and bytes(fs.cat_file(uri)) == data
        except OSError as error:
            # What S3 and its imitations answer if the condition "only if absent" does not hold.
            if (
                "PreconditionFailed" in str(error)
                or "ConditionalRequestConflict" in str(error)
                or "412" in str(error)
            ):
                return attempts > 1 and bytes(fs.cat_file(uri)) == data
            raise
        return True

    return in_store("write", uri, put)


def delete(uri: str) -> None:
    """Remove a file; one that is not there is not an error."""
    if is_local(uri):
        on_disk("delete", uri, lambda path: path.unlink(missing_ok=True))
        return

    uri = split_scheme(uri)[1]

    def remove(fs: Any) -> None:
        with suppress(FileNotFoundError):
            fs.rm_file(uri)

    in_store("delete", uri, remove)
