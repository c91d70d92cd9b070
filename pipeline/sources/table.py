"""A list of images' paths or URIs and labels: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import errno
import posixpath
import stat
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.console import Progress
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.formats.table import NO_LABEL
from pipeline.images.left_out import LeftOut
from pipeline.images.refused import Reason, Refused
from pipeline.sources.columns import find_files, labels_of_files
from pipeline.sources.list_tables import TEXT_SUFFIXES as TEXT_SUFFIXES
from pipeline.sources.list_tables import UNKNOWN_SIZE_BYTES, BadRow, ListTable, read_tables
from pipeline.sources.listing import (
    QUIET_S,
    Listing,
    SourceSettings,
    Wanted,
    name_and_class,
    read_each,
    say_note,
)
from pipeline.sources.names import sample_keys
from pipeline.storage.uri import SCHEME, split_scheme

ROW = np.dtype([("reason", np.int8)])
"""Why a row cannot be used: a place in `_ROW_REASONS`, -1 for a row that can."""
_ROW_REASONS = (Reason.BAD_ROW, Reason.NO_PATH, Reason.BAD_PATH, Reason.NOT_A_FILE)
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class ListSource:
    """Images named one by one.

    A row that cannot be used, or whose image is not there, is left out with its reason: links die.
    Names are stored without what may be a secret.

    Args:
        uri: The table; CSV needs a header. Paths in it that are not whole are taken from its own
            folder.
        settings: Which columns are meant.
    """

    def __init__(self, uri: str, settings: SourceSettings | None = None) -> None:
        self.uri = uri
        self._settings = settings or SourceSettings()

    def read_all(self, wanted: Wanted) -> Iterator[bytes | Refused]:
        """Yield the files' bytes."""
        codes = [-1] * len(wanted)
        if wanted.locations is not None:
            codes = wanted.locations["reason"].tolist()

        def read(i: int) -> bytes | Refused:
            if codes[i] >= 0:
                return Refused(_ROW_REASONS[codes[i]])
            try:
                return storage.read_bytes(self._whole(wanted.names[i]))
            except MaelstromError as error:
                reason = _why_unread(error, wanted.names[i])
                if reason is None:
                    raise
                return Refused(reason)

        # One remote image is enough to read several at a time.
        all_local = True
        for name, code in zip(wanted.names, codes, strict=True):
            if code < 0 and not storage.is_local(self._whole(name)):
                all_local = False
                break
        return read_each(self.uri if all_local else "https://", read, len(wanted))

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the URI without what may be a secret, and the class if there is one."""
        return name_and_class(name, class_name)

    def _whole(self, name: str) -> str:
        scheme, path = split_scheme(name)
        if not SCHEME.match(name) and not path.startswith("/"):
            return storage.join(self._folder_of(name), name)
        if scheme in ("", "file") and not storage.is_local(self.uri):
            raise ConfigError(
                f"convert: {storage.redact(self.uri)} names the local file {path!r}; a list from "
                "elsewhere must not. Copy the list to this machine if you trust it."
            )
        return name

    @cached_property
    def _folders(self) -> list[str]:
        """Return the folders that paths may be taken from, the likeliest first."""
        above = "."
        if "/" in self.uri:
            # Empty if the list lies in the root.
            above = self.uri.rstrip("/").rsplit("/", 1)[0] or "/"
        is_https = self.uri.startswith("https:")
        if not is_https and storage.names_several(self.uri):
            # Of a pattern or a list of files, the folder of the first one.
            first = find_files(self.uri)[0]
            return [first.uri.rsplit("/", 1)[0]]
        if is_https or not storage.is_folder(self.uri):
            return [above]
        # The files may lie one folder below, as those of a data set cloned from a hub.
        first = find_files(self.uri)[0]
        own = first.uri.rsplit("/", 1)[0]
        folders = [own, self.uri.rstrip("/"), above]
        return list(dict.fromkeys(folders))

    def _folder_of(self, name: str) -> str:
        """Return the folder that a path is taken from."""
        folders = self._folders
        if len(folders) == 1 or not storage.is_local(self.uri):
            return folders[0]
        for folder in folders:
            path = storage.local_path(storage.join(folder, name))
            if path.exists():
                return folder
        return folders[0]

    def listing(self) -> Listing:
        """Return the images in the order of the list, and behind them the rows that cannot be used.

        Raises:
            DataError: The table cannot be read, or has no row that can be used.
            ConfigError: It has no column of URIs.
        """
        shown = storage.redact(self.uri)
        tables = read_tables(self.uri, self._settings)
        names: list[str] = []
        columns: list[str] = []
        bad: list[BadRow] = []
        for table in tables:
            names.extend(table.names)
            columns.extend(table.columns)
            bad.extend(table.bad)
        if not names and not bad:
            raise DataError(f"convert: {shown} has no rows. Check that it is complete.")
        parts = [table.label for table in tables]
        left_out = LeftOut()
        labels, classes = labels_of_files(
            parts,
            columns,
            self._settings,
            shown=shown,
            left_out=left_out,
        )

        # Every URI is looked at before any image is read: a list of mistakes should stop at once.
        looked, sizes = self._look_up(names)
        given = _given_sizes(tables)
        if given is not None:
            sizes = given
        good: list[str] = []
        rows: list[int] = []
        for row, found in enumerate(looked):
            if isinstance(found, BadRow):
                bad.append(found)
            else:
                good.append(found)
                rows.append(row)
        kept = np.array(rows, np.int64)
        if bad:
            _report(bad, len(good), shown, left_out)

        # Keys of good rows alone: a bad one must not change the folder that all have in common.
        keys = sample_keys(_short(pa.array(good, pa.string())))
        bad_names = [row.name for row in bad]
        unused = pa.array(["rejected"] * len(bad), pa.string())
        no_label = np.full(len(bad), NO_LABEL, np.int32)
        no_bytes = np.zeros(len(bad), np.int64)
        locations = None
        if bad:
            # Told to the workers, which see single rows and not the table.
            reasons = [_ROW_REASONS.index(row.reason) for row in bad]
            codes = [-1] * len(good) + reasons
            locations = np.array(codes, np.int8).view(ROW)
        return Listing(
            uri=self.uri,
            names=pa.array(good + bad_names, pa.string()),
            sizes=np.append(sizes[kept], no_bytes),
            labels=np.append(labels[kept], no_label),
            classes=classes,
            passed_over={},
            left_out=left_out,
            kind="list",
            keys=pa.concat_arrays([keys, unused]),
            locations=locations,
        )

    def _look_up(self, names: list[str]) -> tuple[list[str | BadRow], npt.NDArray[np.int64]]:
        """Return the names as they are read, or why one cannot be, and the sizes of local files.

        The size of a remote image is a guess: only the shards' bounds need it.
        """
        looked: list[str | BadRow] = []
        sizes = np.full(len(names), UNKNOWN_SIZE_BYTES, np.int64)
        label = f"Looking up sizes for {storage.name_of(self.uri)}"
        with Progress(label, total=len(names), after_s=QUIET_S) as progress:
            for row, name in enumerate(names):
                progress.advance(1)
                found, size = self._look(name)
                looked.append(found)
                sizes[row] = size
        return looked, sizes

    def _look(self, name: str) -> tuple[str | BadRow, int]:
        """Return one image's name and size, or why no file can have this name."""
        try:
            uri = self._whole(name)
            if not storage.is_local(uri):
                return name.strip(), UNKNOWN_SIZE_BYTES
            status = storage.local_path(uri).stat()
        except (ConfigError, ValueError, RuntimeError) as error:
            # Not a scheme that is opened, a NUL byte, or the home folder of an unknown user.
            return _bad_path(name, error), 0
        except OSError as error:
            if error.errno in _PATH_ERRORS:
                return _bad_path(name, error), 0
            # Blanks around a name are rarely meant; a file of that very name counts first.
            if name != name.strip():
                return self._look(name.strip())
            # Reading it will say what is wrong; without bytes it fills no shard.
            return name, 0
        if not stat.S_ISREG(status.st_mode):
            problem = DataError(f"convert: {name!r} is a folder or a device, not a file.")
            return BadRow(name, Reason.NOT_A_FILE, problem), 0
        return name, status.st_size


def _bad_path(name: str, error: Exception) -> BadRow:
    """Return a row whose path cannot be opened, by its own error if that explains it."""
    if not isinstance(error, MaelstromError):
        error = DataError(f"convert: {name!r:.200} is not a valid path ({error}).")
    return BadRow(name, Reason.BAD_PATH, error)


def _report(bad: list[BadRow], num_good: int, shown: str, left_out: LeftOut) -> None:
    """Say how many rows cannot be used, and why the first one cannot.

    Raises:
        MaelstromError: There is no other row: the first one's error.
    """
    if not num_good:
        raise bad[0].error
    problem = str(bad[0].error).removeprefix("convert: ").rstrip(".")
    num_rows = len(bad) + num_good
    say_note(
        left_out,
        f"{shown}: {len(bad):,} of {num_rows:,} rows cannot be used, for example: {problem}. They "
        "are left out and listed in rejected.parquet.",
    )


def _why_unread(error: MaelstromError, name: str) -> Reason | None:
    """Return why one image of a list cannot be read; None if the others could not be either."""
    cause = error.__cause__
    # Object storage answers 403 to expired credentials too, and then to all images.
    status = getattr(cause, "status", None) if name.startswith("https:") else None
    is_missing = isinstance(cause, FileNotFoundError | NotADirectoryError)
    # Storage has told apart what may pass by itself.
    if status in (404, 410) or (is_missing and isinstance(error, DataError)):
        return Reason.NOT_FOUND
    if isinstance(cause, IsADirectoryError):
        return Reason.NOT_A_FILE
    is_forbidden = isinstance(cause, PermissionError) and cause.filename is not None
    return Reason.NO_PERMISSION if is_forbidden or status in (401, 403) else None


def _given_sizes(tables: list[ListTable]) -> npt.NDArray[np.int64] | None:
    """Return the sizes that the tables give; None unless all do.

    They count for all images: a remote one cannot be asked cheaply.
    """
    sizes = [table.sizes for table in tables if table.sizes is not None]
    return np.concatenate(sizes) if sizes and len(sizes) == len(tables) else None


def _short(names: pa.StringArray) -> pa.StringArray:
    """Return paths for keys: without scheme, user, query, `..`, and the folders that all have in
    common."""
    short = pc.replace_substring_regex(names, r"^[A-Za-z][A-Za-z0-9+.-]*://([^/@]*@)?", "")
    short = pc.if_else(
        pc.match_substring_regex(names, "^https:"),
        pc.replace_substring_regex(short, r"[?#].*$", ""),
        short,
    )
    paths: list[str] = []
    for text in short.to_pylist():
        path = posixpath.normpath(str(text)).lstrip("/")
        # A key becomes a member's name, which must not lead out of a folder.
        inside = [part for part in path.split("/") if part != ".."]
        paths.append("/".join(inside))
    folders = [posixpath.dirname(path) for path in paths]
    common = posixpath.commonpath(folders)
    skip = len(common) + 1 if common else 0
    return pa.array([path[skip:] for path in paths], pa.string())
