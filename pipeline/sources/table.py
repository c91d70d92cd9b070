"""A list of images' paths or URIs and labels: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import errno
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.console import Progress, say
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.formats.table import NO_LABEL
from pipeline.images.refused import Reason, Refused
from pipeline.sources.columns import (
    choose_column,
    choose_label,
    find_files,
    labels_of_files,
    open_parquet,
)
from pipeline.sources.listing import (
    QUIET_S,
    Listing,
    SourceSettings,
    Wanted,
    name_and_class,
    read_each,
)
from pipeline.sources.names import sample_keys
from pipeline.sources.tables.image_field import explain_lists, fields_of
from pipeline.sources.tables.label_column import LabelPart, json_labels, typed_texts
from pipeline.sources.tables.text_rows import (
    DelimitedTable,
    JsonLinesTable,
    TextTable,
    decode_text,
)
from pipeline.storage.uri import SCHEME, split_scheme

URI_COLUMNS = (
    "uri",
    "url",
    "path",
    "file",
    "filename",
    "file_name",
    "image",
    "image_path",
    "image_url",
    "filepath",
    "file_path",
    "img_path",
    "image_file",
    "img",
)
SIZE_COLUMNS = ("size_bytes", "size", "bytes")
DELIMITED_SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""Endings of text tables, and the delimiter that each promises."""
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (*DELIMITED_SUFFIXES, *JSON_LINES_SUFFIXES)
"""Endings of every list that is text."""
_UNKNOWN_SIZE_BYTES = 110_000
"""Size assumed for an image if the list gives none: the mean of ImageNet's train set."""
ROW = np.dtype([("reason", np.int8)])
"""Why a row cannot be used: a place in `_ROW_REASONS`, -1 for a row that can."""
_ROW_REASONS = (Reason.BAD_ROW, Reason.NO_PATH, Reason.BAD_PATH, Reason.NOT_A_FILE)
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


@dataclass(frozen=True)
class _BadRow:
    """A row that cannot be used.

    Args:
        name: What to call it in `rejected.parquet`.
        reason: What it is counted as.
        error: What to tell the user if no row can be used.
    """

    name: str
    reason: Reason
    error: MaelstromError


@dataclass(frozen=True)
class _Table:
    """The rows of one file that name an image.

    Args:
        names: Path or URI in each row.
        label: Their labels.
        sizes: Bytes that the table says each image has; None if it does not say so.
        columns: Names of all columns.
        bad: Rows that name no image.
    """

    names: list[str]
    label: LabelPart
    sizes: npt.NDArray[np.int64] | None
    columns: list[str]
    bad: list[_BadRow]


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
                reason = _why_unread(error)
                if reason is None:
                    raise
                return Refused(reason)

        # One remote image is enough to read several at a time.
        usable = [name for name, code in zip(wanted.names, codes, strict=True) if code < 0]
        all_local = all(storage.is_local(self._whole(name)) for name in usable)
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
        above = self.uri.rstrip("/").rsplit("/", 1)[0] if "/" in self.uri else "."
        if self.uri.startswith("https:") or not storage.is_folder(self.uri):
            return [above or "/"]
        # The files may lie one folder below, as those of a data set cloned from a hub.
        own = find_files(self.uri)[0].uri.rsplit("/", 1)[0]
        return list(dict.fromkeys([own, self.uri.rstrip("/"), above or "/"]))

    def _folder_of(self, name: str) -> str:
        """Return the folder that a path is taken from."""
        folders = self._folders
        if len(folders) == 1 or not storage.is_local(self.uri):
            return folders[0]
        there = (f for f in folders if storage.local_path(storage.join(f, name)).exists())
        return next(there, folders[0])

    def listing(self) -> Listing:
        """Return the images in the order of the list, and behind them the rows that cannot be used.

        Raises:
            DataError: The table cannot be read, or has no row that can be used.
            ConfigError: It has no column of URIs.
        """
        shown = storage.redact(self.uri)
        tables = self._read_tables()
        columns = [name for table in tables for name in table.columns]
        parts = [table.label for table in tables]
        labels, classes = labels_of_files(parts, columns, self._settings, shown=shown)
        names = [name for table in tables for name in table.names]
        bad = [row for table in tables for row in table.bad]
        if not names and not bad:
            raise DataError(f"convert: {shown} has no rows. Check that it is complete.")

        # Every URI is looked at before any image is read: a list of mistakes should stop at once.
        looked, sizes = self._look_up(names)
        is_good = np.array([not isinstance(found, _BadRow) for found in looked], np.bool_)
        good = [found for found in looked if isinstance(found, str)]
        bad += [found for found in looked if isinstance(found, _BadRow)]
        given = _given_sizes(tables)
        sizes = (sizes if given is None else given)[is_good]
        if bad:
            _report(bad, len(good), shown)
        keys = sample_keys(_short(pa.array(good, pa.string())))
        unused = pa.array(["rejected"] * len(bad), pa.string())
        codes = [-1] * len(good) + [_ROW_REASONS.index(row.reason) for row in bad]
        return Listing(
            uri=self.uri,
            names=pa.array([*good, *(row.name for row in bad)], pa.string()),
            sizes=np.append(sizes, np.zeros(len(bad), np.int64)),
            labels=np.append(labels[is_good], np.full(len(bad), NO_LABEL, np.int32)),
            classes=classes,
            passed_over={},
            kind="list",
            keys=pa.concat_arrays([keys, unused]),
            locations=np.array([(code,) for code in codes], ROW) if bad else None,
        )

    def _read_tables(self) -> list[_Table]:
        suffix = PurePosixPath(storage.name_of(self.uri)).suffix.lower()
        if suffix not in TEXT_SUFFIXES:
            return [self._read_parquet(file.uri) for file in find_files(self.uri)]

        shown = storage.redact(self.uri)
        text = decode_text(storage.read_bytes(self.uri), shown=shown)
        if suffix in JSON_LINES_SUFFIXES:
            return [self._read_text(JsonLinesTable(text), shown)]
        table = DelimitedTable(text, delimiter=DELIMITED_SUFFIXES[suffix], is_header=self._has_uris)
        return [self._read_text(table, shown)]

    def _has_uris(self, columns: list[str]) -> bool:
        """Tell whether columns include one of URIs."""
        asked = self._settings.image_column
        usual = {name.lower() for name in columns} & set(URI_COLUMNS)
        return bool(usual) if asked is None else asked in columns

    def _uri_column(self, columns: list[str], shown: str, *, more: str = "") -> str:
        """Return the column of URIs.

        Raises:
            ConfigError: There is none.
        """
        asked = self._settings.image_column
        column = choose_column(columns, URI_COLUMNS, asked, option="--image-column", shown=shown)
        if column is None:
            raise ConfigError(
                f"convert: {shown} has no column of URIs ({', '.join(URI_COLUMNS)}); it has "
                f"{', '.join(columns) or 'none'}. Choose one with --image-column; a CSV needs a "
                f"header, for example a first line `path,label`.{more}"
            )
        return column

    def _read_text(self, table: TextTable, shown: str) -> _Table:
        """Read a text table."""
        uri_place = table.columns.index(self._uri_column(table.columns, shown))
        label = choose_label(table.columns, self._settings, shown=shown)
        label_place = None if label is None else table.columns.index(label)
        size = choose_column(table.columns, SIZE_COLUMNS, None, option="", shown=shown)
        size_place = None if size is None else table.columns.index(size)

        file_name = storage.name_of(self.uri)
        names: list[str] = []
        labels: list[Any] = []
        sizes: list[Any] = []
        bad: list[_BadRow] = []
        for row in table.rows():
            value = None if row.values is None else row.values[uri_place]
            is_path = isinstance(value, str) and value.strip() != ""
            if row.values is None or not is_path:
                bad.append(_unnamed(f"{file_name} line {row.line}", value, row.problem))
                continue
            names.append(str(value))
            labels.append(None if label_place is None else row.values[label_place])
            sizes.append(None if size_place is None else row.values[size_place])

        is_json = isinstance(table, JsonLinesTable)
        described = f"column {label!r} of {shown}"
        values = json_labels(labels, described) if is_json else typed_texts(labels)
        part = LabelPart(shown, label, values)
        given = typed_texts([None if size is None else str(size) for size in sizes])
        return _Table(names, part, _whole_sizes(given), table.columns, bad)

    def _read_parquet(self, uri: str) -> _Table:
        """Read one Parquet file of URIs."""
        shown = storage.redact(uri)
        with open_parquet(uri) as parquet:
            schema = parquet.schema_arrow
            columns = list(schema.names)
            fields = fields_of(schema)
            # A column of paths counts before another of a usual name, such as lists of images.
            with_text = [field.name for field in fields if field.text_path]
            if self._settings.image_column is not None or not self._has_uris(with_text):
                with_text = [field.name for field in fields]
            chosen = self._uri_column(with_text, shown, more=explain_lists(schema))
            field = next(field for field in fields if field.name == chosen)
            path = field.text_path
            if pa.types.is_null(field.kind):  # an empty file has no type
                path = field.name
            if not path:
                raise DataError(
                    f"convert: {shown}: column {chosen!r} holds {field.kind}; expected a path or "
                    f"URI in every row. Choose another with --image-column.{explain_lists(schema)}"
                )
            values = field.leaf(parquet.read(columns=[path], use_threads=False))

            label = choose_label(columns, self._settings, shown=shown, is_needed=False)
            labels = pa.chunked_array([pa.nulls(len(values))])
            if label is not None:
                labels = parquet.read(columns=[label], use_threads=False).column(0)
            size = choose_column(columns, SIZE_COLUMNS, None, option="", shown=shown)
            sizes: Any = labels
            if size is not None:
                sizes = parquet.read(columns=[size], use_threads=False).column(0)

        texts = values.cast(pa.string()).to_pylist()
        named = [row for row, text in enumerate(texts) if text is not None and text.strip()]
        unnamed = sorted(set(range(len(texts))) - set(named))
        if unnamed:
            labels = _rows_of(labels, named)
            sizes = _rows_of(sizes, named)
        return _Table(
            names=[str(texts[row]) for row in named],
            label=LabelPart(shown, label, labels),
            sizes=None if size is None else _whole_sizes(sizes),
            columns=columns,
            bad=[_unnamed(f"{storage.name_of(uri)} row {row + 1}", None, "") for row in unnamed],
        )

    def _look_up(self, names: list[str]) -> tuple[list[str | _BadRow], npt.NDArray[np.int64]]:
        """Return the names as they are read, or why one cannot be, and the sizes of local files.

        The size of a remote image is a guess: only the shards' bounds need it.
        """
        looked: list[str | _BadRow] = []
        sizes = np.full(len(names), _UNKNOWN_SIZE_BYTES, np.int64)
        label = f"Looking up sizes for {storage.name_of(self.uri)}"
        with Progress(label, total=len(names), after_s=QUIET_S) as progress:
            for row, name in enumerate(names):
                progress.advance(1)
                found, size = self._look(name)
                looked.append(found)
                sizes[row] = size
        return looked, sizes

    def _look(self, name: str) -> tuple[str | _BadRow, int]:
        """Return one image's name and size, or why no file can have this name."""
        try:
            uri = self._whole(name)
            if not storage.is_local(uri):
                return name.strip(), _UNKNOWN_SIZE_BYTES
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
            return _BadRow(name, Reason.NOT_A_FILE, problem), 0
        return name, status.st_size


def _rows_of(values: Any, rows: list[int]) -> Any:
    """Return some rows of a column."""
    # Arrow cannot pick rows of a view.
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.string())
    return values.take(pa.array(rows, pa.int64()))


def _unnamed(name: str, value: Any, problem: str) -> _BadRow:
    """Return a row that names no image."""
    is_missing = not problem and (value is None or (isinstance(value, str) and not value.strip()))
    if is_missing:
        problem = "no path or URL"
    elif not problem:
        problem = f"{value!r:.80} is not a path or URL"
    reason = Reason.NO_PATH if is_missing else Reason.BAD_ROW
    return _BadRow(name, reason, DataError(f"convert: {name}: {problem}."))


def _bad_path(name: str, error: Exception) -> _BadRow:
    """Return a row whose path cannot be opened, by its own error if that explains it."""
    if not isinstance(error, MaelstromError):
        error = DataError(f"convert: {name!r:.200} is not a valid path ({error}).")
    return _BadRow(name, Reason.BAD_PATH, error)


def _report(bad: list[_BadRow], num_good: int, shown: str) -> None:
    """Say how many rows cannot be used, and why the first one cannot.

    Raises:
        MaelstromError: There is no other row: the first one's error.
    """
    if not num_good:
        raise bad[0].error
    problem = str(bad[0].error).removeprefix("convert: ").rstrip(".")
    say(
        f"convert: {shown}: {len(bad):,} of {len(bad) + num_good:,} rows cannot be used, for "
        f"example: {problem}. They are left out and listed in rejected.parquet."
    )


def _why_unread(error: MaelstromError) -> Reason | None:
    """Return why one image of a list cannot be read; None if the others could not be either."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    is_gone = isinstance(cause, FileNotFoundError | NotADirectoryError) or status in (404, 410)
    if isinstance(error, DataError) and is_gone:
        return Reason.NOT_FOUND
    if isinstance(cause, IsADirectoryError):
        return Reason.NOT_A_FILE
    # Only of files and web servers: object storage says the same of expired credentials.
    is_local = isinstance(cause, PermissionError) and cause.filename is not None
    return Reason.NO_PERMISSION if is_local or status in (401, 403) else None


def _whole_sizes(values: Any) -> npt.NDArray[np.int64] | None:
    """Return sizes that a table gives; None if they are not whole numbers."""
    if not pa.types.is_integer(values.type):
        return None
    sizes = values.fill_null(_UNKNOWN_SIZE_BYTES).cast(pa.int64(), safe=False).to_numpy()
    return np.maximum(sizes, 0)


def _given_sizes(tables: list[_Table]) -> npt.NDArray[np.int64] | None:
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
    texts = [posixpath.normpath(str(text)).lstrip("/") for text in short.to_pylist()]
    texts = ["/".join(part for part in text.split("/") if part != "..") for text in texts]
    common = posixpath.commonpath([posixpath.dirname(text) for text in texts])
    skip = len(common) + 1 if common else 0
    return pa.array([text[skip:] for text in texts], pa.string())
