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
from pipeline.sources.list_tables import (
    UNKNOWN_SIZE_BYTES,
    BadRow,
    ListTable,
    read_tables,
)
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
            name = wanted.names[i]
            try:
                whole = self._whole(name)
                return storage.read_bytes(whole)
            except MaelstromError as error:
                # Of one image, or of all: an outage must stop the conversion, not empty it.
                reason = _why_unread(error, name)
                if reason is None:
                    raise
                return Refused(reason)

        # One remote image is enough to read several at a time.
        all_local = True
        for name, code in zip(wanted.names, codes, strict=True):
            if code >= 0:
                continue
            whole = self._whole(name)
            if not storage.is_local(whole):
                all_local = False
                break
        # Only the scheme counts here: it tells how many reads may be under way.
        place = self.uri
        if not all_local:
            place = "https://rows"
        return read_each(place, read, len(wanted))

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the URI without what may be a secret, and the class if there is one."""
        return name_and_class(name, class_name)

    def _whole(self, name: str) -> str:
        scheme, path = split_scheme(name)
        has_scheme = SCHEME.match(name) is not None
        is_absolute = path.startswith("/")
        if not has_scheme and not is_absolute:
            folder = self._folder_of(name)
            return storage.join(folder, name)
        # A list that somebody else can write could name any file that this user can read.
        names_local_file = scheme in ("", "file")
        if names_local_file and not storage.is_local(self.uri):
            shown = storage.redact(self.uri)
            raise ConfigError(
                f"convert: {shown} names the local file {path!r}; a list from elsewhere must not. "
                "Copy the list to this machine if you trust it."
            )
        return name

    @cached_property
    def _folders(self) -> list[str]:
        """Return the folders that paths may be taken from, the likeliest first."""
        above = "."
        if "/" in self.uri:
            # Empty if the list lies in the root.
            parts = self.uri.rstrip("/").rsplit("/", 1)
            above = parts[0] or "/"
        is_https = self.uri.startswith("https:")
        if not is_https and storage.names_several(self.uri):
            # Of a pattern or a list of files, the folder of the first one.
            files = find_files(self.uri)
            parts = files[0].uri.rsplit("/", 1)
            return [parts[0]]
        if is_https or not storage.is_folder(self.uri):
            return [above]
        # The files may lie one folder below, as those of a data set cloned from a hub.
        files = find_files(self.uri)
        parts = files[0].uri.rsplit("/", 1)
        own = parts[0]
        given = self.uri.rstrip("/")
        folders = [own, given, above]
        # Each once, the likeliest first: two of them are often the same.
        distinct = dict.fromkeys(folders)
        return list(distinct)

    def _folder_of(self, name: str) -> str:
        """Return the folder that a path is taken from."""
        folders = self._folders
        likeliest = folders[0]
        if len(folders) == 1:
            return likeliest
        # On a store each look would be a request per image.
        if not storage.is_local(self.uri):
            return likeliest
        for folder in folders:
            whole = storage.join(folder, name)
            path = storage.local_path(whole)
            if path.exists():
                return folder
        # Reading it will say that the file is missing.
        return likeliest

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
        good_names = pa.array(good, pa.string())
        short = _short(good_names)
        keys = sample_keys(short)

        # Bad rows stand behind the good ones, so that they do not move the good ones' places.
        num_bad = len(bad)
        names_of_bad = [row.name for row in bad]
        bad_names = pa.array(names_of_bad, pa.string())
        unused = pa.array(["rejected"] * num_bad, pa.string())
        no_label = np.full(num_bad, NO_LABEL, np.int32)
        no_bytes = np.zeros(num_bad, np.int64)
        return Listing(
            uri=self.uri,
            names=pa.concat_arrays([good_names, bad_names]),
            sizes=np.append(sizes[kept], no_bytes),
            labels=np.append(labels[kept], no_label),
            classes=classes,
            passed_over={},
            left_out=left_out,
            kind="list",
            keys=pa.concat_arrays([keys, unused]),
            locations=_codes_of_rows(len(good), bad),
        )

    def _look_up(
        self, names: list[str]
    ) -> tuple[list[str | BadRow], npt.NDArray[np.int64]]:
        """Return the names as they are read, or why one cannot be, and the sizes of local files.

        The size of a remote image is a guess: only the shards' bounds need it.
        """
        looked: list[str | BadRow] = []
        sizes = np.full(len(names), UNKNOWN_SIZE_BYTES, np.int64)
        list_name = storage.name_of(self.uri)
        label = f"Looking up sizes for {list_name}"
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
            path = storage.local_path(uri)
            status = path.stat()
        except (ConfigError, ValueError, RuntimeError) as error:
            # Not a scheme that is opened, a NUL byte, or the home folder of an unknown user.
            bad = _bad_path(name, error)
            return bad, 0
        except OSError as error:
            if error.errno in _PATH_ERRORS:
                bad = _bad_path(name, error)
                return bad, 0
            # Blanks around a name are rarely meant; a file of that very name counts first.
            stripped = name.strip()
            if name != stripped:
                return self._look(stripped)
            # Reading it will say what is wrong; without bytes it fills no shard.
            return name, 0
        if not stat.S_ISREG(status.st_mode):
            problem = DataError(
                f"convert: {name!r} is a folder or a device, not a file."
            )
            bad = BadRow(name, Reason.NOT_A_FILE, problem)
            return bad, 0
        return name, status.st_size


def _codes_of_rows(num_good: int, bad: list[BadRow]) -> npt.NDArray[np.void] | None:
    """Return a code of `_ROW_REASONS` for each row, the good ones first; None if all are good."""
    if not bad:
        return None
    # Told to the workers, which see single rows and not the table.
    good_codes = [-1] * num_good
    bad_codes = [_ROW_REASONS.index(row.reason) for row in bad]
    codes = np.array(good_codes + bad_codes, np.int8)
    return codes.view(ROW)


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
    first_error = bad[0].error
    if not num_good:
        raise first_error
    # A sentence inside another one: without the command's name and the full stop.
    text = str(first_error)
    text = text.removeprefix("convert: ")
    problem = text.rstrip(".")
    num_bad = len(bad)
    num_rows = num_bad + num_good
    note = (
        f"{shown}: {num_bad:,} of {num_rows:,} rows cannot be used, for example: {problem}. They "
        "are left out and listed in rejected.parquet."
    )
    say_note(left_out, note)


def _why_unread(error: MaelstromError, name: str) -> Reason | None:
    """Return why one image of a list cannot be read; None if the others could not be either."""
    cause = error.__cause__
    # Object storage answers 403 to expired credentials too, and then to all images.
    status = None
    if name.startswith("https:"):
        status = getattr(cause, "status", None)
    if status in (404, 410):
        return Reason.NOT_FOUND
    # Storage has told apart what may pass by itself.
    is_missing = isinstance(cause, FileNotFoundError | NotADirectoryError)
    is_lasting = isinstance(error, DataError)
    if is_missing and is_lasting:
        return Reason.NOT_FOUND
    if isinstance(cause, IsADirectoryError):
        return Reason.NOT_A_FILE
    if status in (401, 403):
        return Reason.NO_PERMISSION
    # Without a file's name it is the store that refused, and it will refuse all others.
    if isinstance(cause, PermissionError) and cause.filename is not None:
        return Reason.NO_PERMISSION
    return None


def _given_sizes(tables: list[ListTable]) -> npt.NDArray[np.int64] | None:
    """Return the sizes that the tables give; None unless all do.

    They count for all images: a remote one cannot be asked cheaply.
    """
    sizes = []
    for table in tables:
        if table.sizes is None:
            return None
        sizes.append(table.sizes)
    if not sizes:
        return None
    return np.concatenate(sizes)


def _short(names: pa.StringArray) -> pa.StringArray:
    """Return paths for keys: without scheme, user, query, `..`, and the folders that all have in
    common."""
    short = pc.replace_substring_regex(
        names, r"^[A-Za-z][A-Za-z0-9+.-]*://([^/@]*@)?", ""
    )
    # Elsewhere `?` and `#` are characters of a name.
    is_https = pc.match_substring_regex(names, "^https:")
    without_query = pc.replace_substring_regex(short, r"[?#].*$", "")
    short = pc.if_else(is_https, without_query, short)
    paths: list[str] = []
    for text in short.to_pylist():
        path = posixpath.normpath(str(text))
        path = path.lstrip("/")
        # A key becomes a member's name, which must not lead out of a folder.
        parts = path.split("/")
        inside = [part for part in parts if part != ".."]
        paths.append("/".join(inside))
    folders = [posixpath.dirname(path) for path in paths]
    common = posixpath.commonpath(folders)
    skip = 0
    if common:
        # The slash behind it, too.
        skip = len(common) + 1
    rests = [path[skip:] for path in paths]
    return pa.array(rests, pa.string())
