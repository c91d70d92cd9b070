"""Makes labels of a table's column, whatever its type, and of several files that differ.

Numbers are kept, names are numbered in sorted order, null is -1. What could give an image the
wrong class is an error that names the file: a fraction, a number out of range, numbers in one file
and names in another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, DataError
from pipeline.formats.table import NO_LABEL

Labels = tuple[npt.NDArray[np.int32], list[str] | None]
"""Class number of each image, -1 if it has none, and the class names; None without names."""
MISSING_WORDS = frozenset(
    {"#N/A", "#NA", "-NaN", "-nan", "1.#IND", "<NA>", "N/A", "NA", "NULL", "NaN", "None"}
    | {"n/a", "nan", "null"}
)
"""Words that stand for a missing value in CSV, which has no null of its own; pandas' list."""
_MAX_LABEL = 2**31 - 1
# Python refuses to read thousands of digits as a whole number, but not as a float.
_WHOLE = re.compile(r"[+-]?\d{1,40}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class LabelPart:
    """The labels of one file.

    Args:
        shown: What to call the file in errors.
        column: Name of the column; None if the file has none.
        values: One value per image; of any type.
        class_names: Names that the file gives its numbers, if it does.
    """

    shown: str
    column: str | None
    values: pa.ChunkedArray
    class_names: list[str] | None = None

    def describe(self) -> str:
        """Return the column and its file, for errors."""
        return f"column {self.column!r} of {self.shown}"


def no_labels(count: int) -> Labels:
    """Return the labels of images without classes."""
    return np.full(count, NO_LABEL, np.int32), None


def labels_of_parts(parts: Sequence[LabelPart]) -> Labels:
    """Return the labels of all files, one after the other.

    Raises:
        ConfigError: A column holds neither numbers nor names.
        DataError: A value cannot be a label; one file has numbers and another names; two files
            give different names to the numbers.
    """
    read = [_read(part) for part in parts]
    # A file without any label fits to numbers and to names.
    numbered = [part for part, one in zip(parts, read, strict=True) if one.numbers is not None]
    named = [part for part, one in zip(parts, read, strict=True) if one.names is not None]
    if numbered and named:
        raise DataError(
            f"convert: {numbered[0].describe()} holds numbers and {named[0].describe()} holds "
            "names, so that one class would have two labels. Convert them one by one, choose "
            "another --label-column, or give --labels none."
        )

    if named:
        texts = [
            pa.nulls(one.count, pa.string()) if one.names is None else one.names for one in read
        ]
        declared = {name for one in read for name in one.declared}
        return number_classes(pa.concat_arrays(texts), declared)
    if not numbered:
        return no_labels(sum(one.count for one in read))
    absent = [np.full(one.count, NO_LABEL, np.int32) for one in read]
    numbers = [
        nothing if one.numbers is None else one.numbers
        for one, nothing in zip(read, absent, strict=True)
    ]
    return np.concatenate(numbers), _class_names(parts)


def number_classes(
    texts: pa.Array[Any], declared: set[str] | None = None
) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Number class names in sorted order.

    Args:
        texts: A name per image, or null.
        declared: Further names that are classes, even if no image has them.

    Returns:
        The class number of each text, -1 for null, and the class names.
    """
    encoded = texts.dictionary_encode()
    names = [str(name) for name in encoded.dictionary.to_pylist()]
    classes = sorted({*names, *(declared or ())})
    number_of = {name: number for number, name in enumerate(classes)}
    # Arrow numbers names as it meets them. The extra last code stands for null.
    codes = np.array([*(number_of[name] for name in names), NO_LABEL], np.int32)
    met = encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
    return codes[met], classes


def typed_texts(texts: Sequence[str | None]) -> pa.ChunkedArray:
    """Return the labels of a text table: numbers or truth values if all are, else names.

    Args:
        texts: As they stand in the file; blanks around them do not count, and an empty one or one
            of `MISSING_WORDS` is null.
    """
    encoded = pa.array(texts, pa.string()).dictionary_encode()
    # Decided on the distinct texts: a million rows have a thousand classes.
    distinct = [_clean(str(text)) for text in encoded.dictionary.to_pylist()]
    known = [text for text in distinct if text is not None]
    values: list[Any] = list(distinct)
    if all(_WHOLE.fullmatch(text) for text in known):
        values = [None if text is None else int(text) for text in distinct]
    elif all(_DECIMAL.fullmatch(text) for text in known):
        values = [None if text is None else float(text) for text in distinct]
    elif all(text.lower() in _TRUTH for text in known):
        values = [None if text is None else _TRUTH[text.lower()] for text in distinct]
    return pa.chunked_array([numbers_or_names(values).take(encoded.indices)])


def json_labels(values: Sequence[Any], described: str) -> pa.ChunkedArray:
    """Return the labels of JSON: numbers, also those written as text ("4"), or names.

    Args:
        values: Any values of JSON; null, NaN and empty text are no label.
        described: The column and its file, for errors.

    Raises:
        ConfigError: A value is neither a number nor a text.
        DataError: There are numbers and names.
    """
    wrong = next((value for value in values if isinstance(value, list | dict)), None)
    if wrong is not None:
        raise ConfigError(
            f"convert: {described} holds {wrong!r:.80}; expected whole numbers or names. Choose "
            "another with --label-column, or give --labels none."
        )
    texts = [value if isinstance(value, str) and value.strip() else None for value in values]
    others = [None if isinstance(value, str) else value for value in values]
    as_numbers = [_number(text) for text in texts]
    unread = [t for t, n in zip(texts, as_numbers, strict=True) if t is not None and n is None]
    numbers = [value for value in others if value is not None]
    if unread and numbers:
        raise DataError(
            f"convert: {described} holds the number {numbers[0]} and the name {unread[0]!r}; one "
            "class would have two labels. Use numbers or names in all rows, or --labels none."
        )
    if unread:
        return pa.chunked_array([pa.array(texts, pa.string())])
    merged: list[Any] = [n if n is not None else v for n, v in zip(as_numbers, others, strict=True)]
    if any(isinstance(value, float) for value in merged):
        merged = [None if value is None else float(value) for value in merged]
    elif not all(value is None or isinstance(value, bool) for value in merged):
        merged = [None if value is None else int(value) for value in merged]
    return pa.chunked_array([numbers_or_names(merged)])


def _number(text: str | None) -> int | float | None:
    """Return the number that a text is; None if it is none."""
    if text is None:
        return None
    text = text.strip()
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else None


def numbers_or_names(values: Sequence[Any]) -> Any:
    """Return values of one kind as Arrow's; a whole number that is too large for it as a float."""
    largest = 2**63
    if any(isinstance(value, int) and not -largest <= value < largest for value in values):
        # Far out of range for a label: kept only so that the error can quote it.
        values = [None if value is None else float(value) for value in values]
    return pa.array(values)


def _clean(text: str) -> str | None:
    clean = text.strip()
    return None if not clean or clean in MISSING_WORDS else clean


@dataclass(frozen=True)
class _Read:
    """A file's labels: numbers, or names, or neither if it has no label."""

    count: int
    numbers: npt.NDArray[np.int32] | None = None
    names: pa.StringArray | None = None
    declared: frozenset[str] = frozenset()


def _names_or_nulls(read: _Read) -> Any:
    return pa.nulls(read.count, pa.string()) if read.names is None else read.names


def _read(part: LabelPart) -> _Read:
    """Sort a column's values by what they are."""
    count = len(part.values)
    declared: frozenset[str] = frozenset()
    values: Any = _without_extension(part.values)
    if pa.types.is_dictionary(values.type):
        # The categories of a table are its classes: one that no image of this split has must not
        # shift the numbers of those behind it.
        declared = _categories(values)
        values = values.cast(values.type.value_type)

    kind = values.type
    if values.null_count == count and not declared:
        return _Read(count)
    if pa.types.is_boolean(kind):
        values = values.cast(pa.uint8())
    elif _is_text(kind):
        names = _names(values)
        is_empty = names.null_count == count and not declared
        return _Read(count) if is_empty else _Read(count, names=names, declared=declared)
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = _whole(part, values)
    elif not pa.types.is_integer(kind):
        raise ConfigError(
            f"convert: {part.describe()} holds {kind}; expected whole numbers or names. Choose "
            "another with --label-column, or give --labels none."
        )
    if values.null_count == count:
        return _Read(count)
    _check_range(part, values)
    numbers = values.fill_null(0).cast(pa.int64()).to_numpy().astype(np.int32)
    numbers[_mask(values.is_null())] = NO_LABEL
    return _Read(count, numbers=numbers)


def _without_extension(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of an extension type, such as Arrow's one-byte bool, as they are stored."""
    if not isinstance(values.type, pa.BaseExtensionType):
        return values
    chunks: Any = values.chunks
    kind: Any = values.type.storage_type
    return pa.chunked_array([chunk.storage for chunk in chunks], kind)


def _categories(values: Any) -> frozenset[str]:
    """Return the names in a dictionary column's dictionaries; numbers declare no class."""
    if not _is_text(values.type.value_type):
        return frozenset()
    known = {name for chunk in values.chunks for name in chunk.dictionary.to_pylist()}
    return frozenset(name for name in known if name is not None and name.strip())


def _is_text(kind: Any) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _names(values: Any) -> pa.StringArray:
    """Return names, null for those that are empty or blank."""
    texts = values.cast(pa.string()).chunks
    names = pa.concat_arrays(texts) if texts else pa.array([], pa.string())
    has_name = pc.match_substring_regex(names, r"\S")
    return pc.if_else(has_name, names, pa.scalar(None, pa.string()))


def _whole(part: LabelPart, values: Any) -> Any:
    """Return fractions that are whole numbers as float64, NaN as null."""
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())  # Arrow computes little with float16
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    is_whole = pc.equal(values, pc.trunc(values))
    _refuse(part, values, _mask(is_whole.fill_null(True)), "is not a whole number")
    # Infinite is whole to Arrow; the check of the range then refuses it.
    return values.cast(pa.float64())


def _check_range(part: LabelPart, values: Any) -> None:
    """Refuse numbers that are not class numbers."""
    # As float64, which is exact far beyond the limits: an unsigned column has no -1.
    numbers = values.fill_null(0).to_numpy().astype(np.float64)
    fits = (numbers >= NO_LABEL) & (numbers <= _MAX_LABEL)
    bounds: Any = pc.min_max(values).as_py()
    _refuse(
        part,
        values,
        fits,
        f"is out of range: labels run from {bounds['min']} to {bounds['max']}; expected 0 to "
        "2^31 - 1, or -1 for an image without a label",
    )


def _refuse(part: LabelPart, values: Any, is_fine: npt.NDArray[np.bool_], problem: str) -> None:
    """Name the first value that is not fine."""
    wrong = np.flatnonzero(~is_fine)
    if not len(wrong):
        return
    row = int(wrong[0])
    others = f" and {len(wrong) - 1:,} others" if len(wrong) > 1 else ""
    raise DataError(
        f"convert: {part.describe()}: the label {values[row].as_py()} of image {row + 1:,}{others} "
        f"{problem}. Mend the column, choose another with --label-column, or give --labels none."
    )


def _mask(values: Any) -> npt.NDArray[np.bool_]:
    """Return Arrow's truth values as numpy's."""
    return np.asarray(values.to_numpy(zero_copy_only=False), np.bool_)


def _class_names(parts: Sequence[LabelPart]) -> list[str] | None:
    """Return the names of the numbers: the longest list, of which all others are the beginning."""
    known = [part for part in parts if part.class_names]
    if not known:
        return None
    longest = max(known, key=lambda part: len(part.class_names or []))
    names = longest.class_names or []
    for part in known:
        own = part.class_names or []
        if own == names[: len(own)]:
            continue
        number = next(i for i, name in enumerate(own) if name != names[i])
        raise DataError(
            f"convert: label {number} is {own[number]!r} in {part.shown} and {names[number]!r} in "
            f"{longest.shown}: the files number their classes differently. Convert them one by "
            "one, or give --labels none."
        )
    return names
