"""Addresses that name several files: `train-*.tar`, `train-{0000..0003}.tar`, `a.tar,b.tar`.

The one place in which they are understood, for sources and for datasets, on disks and in object
storage.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator

from pipeline.errors import ConfigError, DataError
from pipeline.storage.door import (
    exists,
    is_folder,
    is_local,
    list_files,
    on_disk,
    size_of,
)
from pipeline.storage.hidden import is_hidden
from pipeline.storage.local import FileInfo
from pipeline.storage.uri import absolute, join, redact, split_scheme

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES = 1_000_000
"""Names that braces may stand for: more is a slip of the keyboard, not a dataset."""
_MARKS = "*?["


def names_several(uri: str) -> bool:
    """Tell whether an address is a pattern or a list of files."""
    if uri.startswith("https:") or not _has_marks(uri):
        return False
    # A file or folder may have such a mark in its own name.
    return not exists(uri)


def _has_marks(uri: str) -> bool:
    has_braces = any(_words(found[1]) is not None for found in _BRACES.finditer(uri))
    is_list = "," in _BRACES.sub("", uri)
    return has_braces or is_list or any(mark in _last_part(uri) for mark in _MARKS)


def _last_part(uri: str) -> str:
    # Not name_of: it takes a question mark for the start of a URL's query.
    return uri.rpartition("/")[2]


def find_named(uri: str) -> list[FileInfo]:
    """Return the files that a pattern or a list names, in order and each once.

    Files of a pattern come by name; those of a list come as they are listed. Hidden files match no
    pattern.

    Raises:
        ConfigError: The pattern cannot be read.
        DataError: A pattern matches no file, or a file that is named is not there.
    """
    found: dict[str, FileInfo] = {}
    for part in _split_list(uri):
        for file in _find_part(part):
            found.setdefault(file.uri, file)
    return list(found.values())


def _split_list(uri: str) -> list[str]:
    """Cut a list at its commas; those inside braces belong to a pattern."""
    # The query of a URL may hold any mark.
    if uri.startswith("https:") or exists_as_is(uri):
        return [uri]
    parts = [""]
    depth = 0
    for char in uri:
        depth += (char == "{") - (char == "}")
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    named = [part.strip() for part in parts]
    if not all(named):
        raise ConfigError(
            f"storage: {redact(uri)!r} is a list with an empty part. Write it as a.tar,b.tar, "
            "without blanks."
        )
    return named


def absolute_named(uri: str) -> str:
    """Return an address that names the same files from every working folder."""
    return ",".join(absolute(part) for part in _split_list(uri))


def exists_as_is(uri: str) -> bool:
    """Tell whether there is a file or folder of exactly this name."""
    # Asking a store costs a request: only names that could be meant in another way are asked for.
    return not _has_marks(uri) or exists(uri)


def _find_part(part: str) -> list[FileInfo]:
    """Return the files of one pattern, or the one file that is named."""
    if exists_as_is(part):
        return [find_one(part)]
    # One listing instead of a request per name: braces often stand for a thousand shards.
    by_folder: dict[str, dict[str, FileInfo]] = {}
    found: list[FileInfo] = []
    for name in expand_braces(part):
        folder = folder_of(name)
        pattern = name.rpartition("/")[2]
        if folder not in by_folder:
            _refuse_folder_marks(folder, part)
            listed = list_files(folder) if is_folder(folder) else iter(())
            by_folder[folder] = {file.name: file for file in listed}
        files = by_folder[folder]
        if pattern in files:
            matching = [files[pattern]]
        else:
            matching = [
                files[each] for each in sorted(files) if _matches(each, pattern)
            ]
        if not matching:
            raise DataError(
                _no_match(
                    part,
                    name,
                    folder,
                    sorted(files),
                )
            )
        found.extend(matching)
    return found


def _no_match(
    part: str,
    name: str,
    folder: str,
    seen: list[str],
) -> str:
    has_wildcards = any(mark in name for mark in _MARKS)
    what = "matches no file" if has_wildcards else "names a file that is not there"
    shown = "" if part == name else f": {redact(name)}"
    holds = ", ".join(seen[:5]) or "no files"
    return (
        f"storage: {redact(part)} {what}{shown}. {redact(folder)} holds {holds}. Check the folder "
        "and the pattern."
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and not is_hidden(name)


def _refuse_folder_marks(folder: str, part: str) -> None:
    if any(mark in _last_part(folder) for mark in "*?") and not is_folder(folder):
        raise ConfigError(
            f"storage: {redact(part)} has a wildcard in the name of a folder. Only the last part "
            "may have one: give the files of one folder, for example data/train-*.tar."
        )


def find_one(uri: str) -> FileInfo:
    """Return a file as a listing of its folder has it.

    Raises:
        ConfigError: It is a folder.
        DataError: There is no such file.
    """
    # A folder in a list of files would be opened as a file much later.
    if is_local(uri) and is_folder(uri):
        raise ConfigError(
            f"storage: {redact(uri)} is a folder, in a list of files. Give the folder alone, or "
            f"its files: {redact(join(uri, '*.tar'))}."
        )
    if is_local(uri):
        # The file's time is its version: a scan that is kept must notice a file that was replaced.
        stat = on_disk(
            "look up",
            uri,
            lambda path: path.stat(),
        )
        return FileInfo(
            _last_part(uri),
            uri,
            stat.st_size,
            str(stat.st_mtime_ns),
        )
    for file in list_files(folder_of(uri)):
        if file.name == _last_part(uri):
            return file
    return FileInfo(
        _last_part(uri),
        uri,
        size_of(uri),
    )


def expand_braces(text: str) -> Iterator[str]:
    """Yield what braces stand for: `{0000..0003}` numbers with their zeros, `{a,b}` words.

    Raises:
        ConfigError: They stand for more than a million names.
    """
    count = 1
    for found in _BRACES.finditer(text):
        words = _words(found[1])
        count *= 1 if words is None else len(words)
    if count > _MOST_NAMES:
        raise ConfigError(
            f"storage: {redact(text)} stands for {count:,} files, more than {_MOST_NAMES:,}. Check "
            "the numbers in the braces."
        )
    yield from _expand(text, 0)


def _expand(text: str, start: int) -> Iterator[str]:
    for found in _BRACES.finditer(text, start):
        words = _words(found[1])
        if words is None:
            continue
        for word in words:
            head = text[: found.start()] + word
            yield from _expand(head + text[found.end() :], len(head))
        return
    yield text


def _words(inner: str) -> _Numbers | list[str] | None:
    """Return what one pair of braces stands for; None if it is part of a name."""
    numbers = _RANGE.fullmatch(inner)
    if numbers:
        return _Numbers(numbers[1], numbers[2])
    return inner.split(",") if "," in inner else None


class _Numbers:
    """The numbers of `{0000..0003}`, as wide as they are written.

    Args:
        first: As written.
        last: As written; may be the smaller one.
    """

    def __init__(self, first: str, last: str) -> None:
        is_padded = any(
            len(text) > 1 and text.startswith("0") for text in (first, last)
        )
        self._width = max(len(first), len(last)) if is_padded else 0
        step = 1 if int(first) <= int(last) else -1
        self._numbers = range(
            int(first),
            int(last) + step,
            step,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return (f"{number:0{self._width}d}" for number in self._numbers)


def folder_of(uri: str) -> str:
    """Return the folder that a file lies in, as its siblings' URIs begin."""
    split_scheme(uri)
    folder, _, _ = uri.rpartition("/")
    return folder or ("/" if uri.startswith("/") else ".")
