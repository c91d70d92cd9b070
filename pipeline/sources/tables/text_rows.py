"""Reads tables that are text: CSV with any usual delimiter, and JSON lines.

A row that cannot be read is given as such, with its line, and reading goes on behind it. What
cannot be told row by row, such as another encoding, is an error that names the line.
"""

from __future__ import annotations

import codecs
import csv
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.errors import DataError

DELIMITERS = (",", "\t", ";", "|")
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class TextRow:
    """One row of a text table.

    Args:
        line: Line of the file at which it starts, from 1.
        values: One per column; text, or any value of JSON. None if the row cannot be read.
        problem: Why it cannot be read.
    """

    line: int
    values: list[Any] | None
    problem: str = ""


class TextTable(Protocol):
    """A table that is text."""

    columns: list[str]

    def rows(self) -> Iterator[TextRow]:
        """Yield the rows in the order of the file; blank ones are skipped."""


def decode_text(data: bytes, *, shown: str) -> str:
    """Return the text of a file, with `\\n` at the ends of its lines.

    Raises:
        DataError: It is not UTF-8, nor UTF-16 with a byte order mark.
    """
    marks = [name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)]
    encoding = marks[0] if marks else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataError(
            f"convert: {shown}, line {line}: byte 0x{byte:02x} is not {encoding}. The "
            "file is probably in Latin-1 or Windows-1252: save it as UTF-8, for example with "
            f"`iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(shown)} > utf8-list`; then give that."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


class DelimitedTable:
    """CSV, also with tabs, semicolons or bars between the values.

    Args:
        text: The file's text.
        delimiter: The one that the file's name promises; tried first.
        is_header: Tells whether the names of columns are those that are looked for.
    """

    def __init__(
        self, text: str, *, delimiter: str, is_header: Callable[[list[str]], bool]
    ) -> None:
        self._lines = [f"{line}\n" for line in text.split("\n")]
        self._start = 0
        self._delimiter = delimiter
        self.columns: list[str] = []
        first = self._lines[0].strip()
        # Excel writes its delimiter into a line of its own.
        if first.lower().startswith("sep=") and first[4:] in DELIMITERS:
            self._delimiter = first[4:]
            self._start = 1
        for line in self._lines[self._start :]:
            if line.strip():
                break
            self._start += 1

        # Not by counting characters: a path or a caption may hold any of them.
        chosen: list[str] = []
        start = self._start
        for mark in dict.fromkeys((self._delimiter, delimiter, *DELIMITERS)):
            columns, end = self._header(mark)
            is_fitting = is_header(columns)
            # If none fits, the error shows the columns of the one that splits the most.
            if is_fitting or len(columns) > len(chosen):
                self._delimiter = mark
                chosen = columns
                start = end
            if is_fitting:
                break
        self.columns = chosen
        self._start = start

    def _header(self, delimiter: str) -> tuple[list[str], int]:
        """Return the names of columns, and the line behind them."""
        for end, values in self._records(self._start, delimiter):
            names = values or []
            return [name.strip() for name in names], end
        return [], len(self._lines)

    def rows(self) -> Iterator[TextRow]:
        """Yield the rows; one with another number of values than the header cannot be read."""
        start = self._start
        for end, values in self._records(start, self._delimiter):
            yield from self._row(start, values)
            start = end

    def _row(self, start: int, values: list[str] | None) -> Iterator[TextRow]:
        """Yield a row unless it is blank."""
        line = start + 1
        if values is None:
            problem = "a quotation mark is missing or stands inside a value"
            if '"' not in self._lines[start]:
                problem = f"a value has more than {csv.field_size_limit():,} characters"
            yield TextRow(line, None, problem)
        elif any(value.strip() for value in values):
            fitted = _fit(values, self.columns)
            if fitted is None:
                problem = f"{len(values)} values, the header has {len(self.columns)}"
                yield TextRow(line, None, problem)
            else:
                yield TextRow(line, fitted)

    def _records(
        self, start: int, delimiter: str
    ) -> Iterator[tuple[int, list[str] | None]]:
        """Yield the line behind each record, and the record's values; None if it is damaged.

        A quotation mark that is never closed would swallow the rest of the file: a damaged record
        ends with its first line, and reading starts again behind it.
        """
        while start < len(self._lines):
            reader = self._reader(start, delimiter, strict=True)
            base = start
            try:
                for values in reader:
                    end = base + reader.line_num
                    has_several = end > start + 1
                    # Several lines, and not one row of this table.
                    if (
                        has_several
                        and self.columns
                        and _fit(values, self.columns) is None
                    ):
                        break
                    yield end, values
                    start = end
                else:
                    return
            except csv.Error:
                # Behind the csv module's limit of a field, or a mark in the middle of a value.
                pass
            yield start + 1, self._leniently(start, delimiter)
            start += 1

    def _reader(self, start: int, delimiter: str, *, strict: bool) -> Any:
        # Not a slice: a reader is made anew behind each damaged row.
        lines = (self._lines[i] for i in range(start, len(self._lines)))
        return csv.reader(
            lines,
            delimiter=delimiter,
            skipinitialspace=True,
            strict=strict,
        )

    def _leniently(self, start: int, delimiter: str) -> list[str] | None:
        """Return the values of one line whose quotation marks are closed, e.g. `"a" , b`."""
        if self._lines[start].count('"') % 2:
            return None
        try:
            return list(next(self._reader(start, delimiter, strict=False)))
        except (csv.Error, StopIteration):
            return None


def _fit(values: list[str], columns: list[str]) -> list[str] | None:
    """Return one value per column; None if there are more or fewer.

    Programs that end each line with a delimiter make an empty value, or a column without a name.
    """
    count = len(columns)
    if len(values) == count:
        return values
    behind = values[count:]
    if behind:
        is_blank = not any(value.strip() for value in behind)
        return values[:count] if is_blank else None
    missing = columns[len(values) :]
    if any(missing):
        return None
    return [*values, *[""] * len(missing)]


class JsonLinesTable:
    """JSON lines: an object per line, as Hugging Face's `metadata.jsonl`.

    Args:
        text: The file's text.
    """

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        # Twice through the file: objects may lack keys, and a million of them are a gigabyte.
        columns: dict[str, None] = {}
        for _, value in self._objects():
            if isinstance(value, dict):
                columns.update(dict.fromkeys(value))
        self.columns = list(columns)

    def rows(self) -> Iterator[TextRow]:
        """Yield the objects' values; a key that is not there is None."""
        for line, value in self._objects():
            if isinstance(value, dict):
                yield TextRow(line, [value.get(name) for name in self.columns])
            else:
                yield TextRow(line, None, "is not a JSON object")

    def _objects(self) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(self._lines, start=1):
            if line.strip():
                yield number, _parse(line)


def _parse(line: str) -> Any:
    """Return a line's value; None if it is not JSON, or has text that no file can hold."""
    try:
        value = json.loads(line)
        # An escaped half of a character is JSON, but not Unicode.
        if "\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value
