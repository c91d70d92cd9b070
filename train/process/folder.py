"""The run's folder: whether it can be written to, and whether another job works in it. Imports no
torch."""

from __future__ import annotations

import errno
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import storage
from pipeline.errors import ConfigError, InfrastructureError, MaelstromError
from train.recipes import RECIPES

_ELSEWHERE = "Move it, or name another place"


def named_run_dir(words: Sequence[str], *, is_launched: bool) -> Path | None:
    """Find the run's folder on a command line whose settings hold a mistake.

    Args:
        words: the command line, without the program's name.
        is_launched: whether a launcher has started this process, so that its exit code is lost.

    Returns:
        None if no folder is named, or if only the recipe names one, and a person who mistyped a
        setting sees the message and the exit code anyway.
    """
    named = [*_given(words, "config", read=_run_dir_of_file), *_given(words, "run.dir")]
    if named and named[-1]:
        return Path(named[-1]).expanduser()
    recipe = next((word for word in words if word in RECIPES), None)
    if recipe is None:
        return None
    folder = Path("runs") / recipe
    return folder if is_launched or folder.is_dir() else None


def _given(
    words: Sequence[str],
    option: str,
    *,
    read: Callable[[str], str] = lambda value: value,
) -> Iterator[str]:
    """Yield what an option was given, in order, read in some way; without what is empty."""
    for number, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if not name.startswith("--") or name[2:].replace("-", "_") != option:
            continue
        if not has_value and number + 1 < len(words):
            value = words[number + 1]
        found = read(value)
        if found:
            yield found


def _run_dir_of_file(path: str) -> str:
    # What is wrong with the file was reported already.
    with suppress(OSError, ValueError):
        text = Path(path).read_text(encoding="utf-8-sig")
        section = tomllib.loads(text).get("run", {})
        if isinstance(section, dict) and isinstance(section.get("dir"), str):
            return str(section["dir"])
    return ""


def prepare_folder(folder: Path) -> None:
    """Make a run's folder and write to it once.

    Args:
        folder: local folder of the run.

    Raises:
        InfrastructureError: it cannot be made, is a file, or cannot be written to.
    """
    try:
        prepare_out(folder, option="--run.dir")
    except ConfigError as error:
        # A file in the way of a run is most often a disk that is not mounted.
        raise InfrastructureError(str(error)) from error


def prepare_file(path: Path, *, option: str) -> None:
    """Make sure that a file can be written before the work whose result it holds; it is not
    touched.

    Args:
        path: the file.
        option: option that names it, with its dashes.

    Raises:
        ConfigError: it is a folder, or one of its parents is a file.
        InfrastructureError: its folder cannot be made or written to.
    """
    if path.is_dir():
        raise ConfigError(
            f"{option} {path}: is a folder, and a file is to be written. Name a file"
        )
    prepare_out(path.parent, option=option)


def prepare_out(folder: Path, *, option: str) -> None:
    """Make the folder that results go to, and write to it once.

    Args:
        folder: the folder.
        option: option that names it, with its dashes.

    Raises:
        ConfigError: it, or one of its parents, is a file.
        InfrastructureError: it cannot be made or written to.
    """
    part = _file_in_the_way(folder)
    if part is not None:
        raise ConfigError(
            f"{option}: {part} is a file, and a folder is needed there. {_ELSEWHERE}"
        )
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Content too: an empty file fits on a full disk.
        probe.write_bytes(b"0" * 4096)
    except OSError as error:
        raise InfrastructureError(
            cannot_write(folder, error, setting=option)
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()


@contextmanager
def writing(path: Path, *, option: str) -> Iterator[None]:
    """Put what keeps a result from being written into words, as trying its place beforehand does:
    a disk may fill up in between.

    Args:
        path: the file.
        option: option that names it or its folder, with its dashes.

    Raises:
        InfrastructureError: the block raised an error of the file system or of the storage.
    """
    try:
        yield
    except (OSError, MaelstromError) as error:
        raise InfrastructureError(cannot_write(path, error, setting=option)) from error


def cannot_write(path: Path, error: BaseException, *, setting: str) -> str:
    """Say why a path cannot be written to, and what to do.

    Args:
        path: the file or folder.
        error: an OSError, or one of the storage or of a library that came of one.
        setting: option that names another place, with its dashes.
    """
    number = _number_of(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        why = "the disk is full. Free some space"
    elif number == errno.EROFS:
        why = "the file system is read-only. Mount it for writing"
    elif number in (errno.EACCES, errno.EPERM):
        why = "permission denied. Change its owner or mode"
    elif number in (errno.EEXIST, errno.ENOTDIR):
        why = f"{_file_in_the_way(path) or path} is a file, and a folder is needed there. Move it"
    elif number == errno.EISDIR:
        why = "it is a folder, and a file is to be written. Move it away"
    else:
        why = f"{storage.redact(str(error))}. Check the disk"
    return f"{setting} {path}: cannot be written: {why}, or give another place with {setting}"


def _number_of(error: BaseException) -> int | None:
    """Find the file system's number of an error, in it or in those that it came of."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno is not None:
            return link.errno
        # safetensors is written in Rust, whose errors come as text only.
        found = re.search(r"\(os error (\d+)\)", str(link))
        if found:
            return int(found.group(1))
        link = link.__cause__ or link.__context__
    return None


def _file_in_the_way(path: Path) -> Path | None:
    """Find the part of a path that is there and is not a folder."""
    for part in (path, *path.parents):
        # Links that lead nowhere are in the way too.
        if os.path.lexists(part) and not part.is_dir():
            return part
    return None
