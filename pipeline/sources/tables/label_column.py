"""Makes labels of a table's column, whatever its type, and of several files that differ.

Numbers are kept, names are numbered in sorted order, null is -1. What could give an image the
wrong class is an error that names the file: a fraction, a number out of range, numbers in one file
and names in another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ConfigError, DataError
from pipeline.formats.table import NO_LABEL
from pipeline.sources.tables.image_field import is_text, readable_texts

Labels = tuple[npt.NDArray[np.int32], list[str] | None]
"""Class number of each image, -1 if it has none, and the class names; None without names."""
MISSING_WORDS = frozenset(
    {
        "#N/A",
        "#NA",
        "-NaN",
        "-nan",
        "1.#IND",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
    }
    | {"n/a", "nan", "null"}
)
"""Words that stand for a missing value in CSV, which has no null of its own; pandas' list."""
_MAX_LABEL = 2**31 - 1
_MAX_INT64 = 2**63 - 1
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
    columns = [_read(part) for part in parts]
    # A file without any label fits to numbers and to names.
    numbered = [column.part for column in columns if column.numbers is not None]
    named = [column.part for column in columns if column.names is not None]
    if numbered and named:
        raise DataError(
            f"convert: {numbered[0].describe()} holds numbers and {named[0].describe()} holds "
            "names, so that one class would have two labels. Convert them one by one, choose "
            "another --label-column, or give --labels none."
        )

    if named:
        texts = [column.names_or_nulls() for column in columns]
        declared: set[str] = set()
        for column in columns:
            declared |= column.declared
        all_texts = pa.concat_arrays(texts)
        return number_classes(all_texts, declared)

    numbers = [column.numbers_or_none() for column in columns]
    if not numbered:
        return np.concatenate(numbers), None
    names = _class_names(parts)
    return np.concatenate(numbers), names


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
    distinct = encoded.dictionary.to_pylist()
    names = [str(name) for name in distinct]
    all_names = set(names)
    if declared is not None:
        all_names |= declared
    classes = sorted(all_names)
    number_of = {name: number for number, name in enumerate(classes)}
    # Arrow numbers names as it meets them. The extra last code stands for null.
    numbers = [number_of[name] for name in names]
    codes = np.array([*numbers, NO_LABEL], np.int32)
    null_code = len(names)
    indices = encoded.indices.fill_null(null_code)
    met = indices.to_numpy(zero_copy_only=False)
    return codes[met], classes


def typed_texts(texts: Sequence[str | None]) -> pa.ChunkedArray:
    """Return the labels of a text table: numbers or truth values if all are, else names.

    Args:
        texts: As they stand in the file; blanks around them do not count, and an empty one or one
            of `MISSING_WORDS` is null.
    """
    column = pa.array(texts, pa.string())
    encoded = column.dictionary_encode()
    # Decided on the distinct texts: a million rows have a thousand classes.
    raw_texts = encoded.dictionary.to_pylist()
    distinct = [_clean(str(text)) for text in raw_texts]
    known = [text for text in distinct if text is not None]
    # In this order: whole numbers are decimals too, and a class may be called `true`.
    read: Callable[[str], Any] = str
    if all(_WHOLE.fullmatch(text) for text in known):
        read = int
    elif all(_DECIMAL.fullmatch(text) for text in known):
        read = float
    elif all(text.lower() in _TRUTH for text in known):
        read = _truth
    values: list[Any] = []
    for text in distinct:
        value = None if text is None else read(text)
        values.append(value)
    typed = numbers_or_names(values)
    labels = typed.take(encoded.indices)
    return pa.chunked_array([labels])


def _truth(text: str) -> bool:
    return _TRUTH[text.lower()]


def json_labels(values: Sequence[Any], described: str) -> pa.ChunkedArray:
    """Return the labels of JSON: numbers, also those written as text ("4"), or names.

    Args:
        values: Any values of JSON; null, NaN and empty text are no label.
        described: The column and its file, for errors.

    Raises:
        ConfigError: A value is neither a number nor a text.
        DataError: There are numbers and names.
    """
    numbers: list[Any] = []
    names: list[str | None] = []
    first_number: Any = None
    first_name: str | None = None
    for value in values:
        if isinstance(value, list | dict):
            raise ConfigError(
                f"convert: {described} holds {value!r:.80}; expected whole numbers or names. "
                "Choose another with --label-column, or give --labels none."
            )
        number = value
        name: str | None = None
        if isinstance(value, str):
            # Digits may turn out to be a name: beside other names they are one.
            number = _number(value)
            if value.strip():
                name = value
            if number is None and first_name is None:
                first_name = name
        elif first_number is None:
            first_number = value
        numbers.append(number)
        names.append(name)

    if first_name is None:
        typed = _one_type(numbers)
        labels = numbers_or_names(typed)
        return pa.chunked_array([labels])
    if first_number is not None:
        raise DataError(
            f"convert: {described} holds the number {first_number} and the name {first_name!r}; "
            "one class would have two labels. Use numbers or names in all rows, or --labels none."
        )
    column = pa.array(names, pa.string())
    return pa.chunked_array([column])


def _one_type(numbers: list[Any]) -> list[Any]:
    """Return numbers of one type: Arrow does not mix whole numbers, floats and truth values."""
    # One float makes all of them floats; None is of neither type.
    has_float = any(isinstance(number, float) for number in numbers)
    one_type = float if has_float else int
    typed: list[Any] = []
    for number in numbers:
        value = None if number is None else one_type(number)
        typed.append(value)
    return typed


def _number(text: str | None) -> int | float | None:
    """Return the number that a text is; None if it is none."""
    if text is None:
        return None
    text = text.strip()
    if _WHOLE.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    return None


def numbers_or_names(values: Sequence[Any]) -> Any:
    """Return values of one kind as Arrow's; a whole number that is too large for it as a float."""
    whole = [value for value in values if isinstance(value, int)]
    largest = max(whole, default=0)
    smallest = min(whole, default=0)
    fits = smallest >= -_MAX_INT64 and largest <= _MAX_INT64
    if not fits:
        # Far out of range for a label: kept only so that the error can quote it.
        values = [None if value is None else float(value) for value in values]
    return pa.array(values)


def _clean(text: str) -> str | None:
    clean = text.strip()
    is_missing = clean in MISSING_WORDS
    if is_missing or not clean:
        return None
    return clean


@dataclass(frozen=True)
class _Column:
    """A file's labels: numbers, or names, or neither if it has no label.

    Args:
        part: The file.
        numbers: Class number of each image, -1 for one without a label.
        names: Class name of each image, or null.
        declared: Names that are classes, even if no image has them.
    """

    part: LabelPart
    numbers: npt.NDArray[np.int32] | None = None
    names: pa.StringArray | None = None
    declared: frozenset[str] = frozenset()

    def numbers_or_none(self) -> npt.NDArray[np.int32]:
        """Return the numbers; -1 for all images if there are none."""
        if self.numbers is not None:
            return self.numbers
        count = len(self.part.values)
        return np.full(count, NO_LABEL, np.int32)

    def names_or_nulls(self) -> Any:
        """Return the names; null for all images if there are none."""
        if self.names is not None:
            return self.names
        count = len(self.part.values)
        return pa.nulls(count, pa.string())


def _read(part: LabelPart) -> _Column:
    """Sort a column's values by what they are."""
    declared: frozenset[str] = frozenset()
    values: Any = _without_extension(part.values)
    if pa.types.is_dictionary(values.type):
        # The categories of a table are its classes: one that no image of this split has must not
        # shift the numbers of those behind it.
        declared = _categories(values)
        values = values.cast(values.type.value_type)

    kind = values.type
    if is_text(kind):
        texts = readable_texts(values)
        unreadable = texts.null_count - values.null_count
        if unreadable:
            raise DataError(
                f"convert: {part.describe()}: {unreadable:,} labels are not UTF-8. Write the "
                "column as UTF-8, choose another with --label-column, or give --labels none."
            )
        names = _names(texts)
        if _is_empty(names) and not declared:
            return _Column(part)
        return _Column(part, names=names, declared=declared)
    # Before the types are told apart: a column of nulls may have any type, or none.
    if _is_empty(values):
        return _Column(part)

    if pa.types.is_boolean(kind):
        values = values.cast(pa.uint8())
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = _whole(part, values)
    elif not pa.types.is_integer(kind):
        raise ConfigError(
            f"convert: {part.describe()} holds {kind}; expected whole numbers or names. Choose "
            "another with --label-column, or give --labels none."
        )
    # Floats that are all NaN have become nulls.
    if _is_empty(values):
        return _Column(part)
    _check_range(part, values)
    # Filled before the cast: numpy has no null in whole numbers.
    is_none = _mask(values.is_null())
    filled = values.fill_null(0)
    numbers = filled.to_numpy().astype(np.int32)
    numbers[is_none] = NO_LABEL
    return _Column(part, numbers=numbers)


def _is_empty(values: Any) -> bool:
    return values.null_count == len(values)


def _without_extension(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of an extension type, such as Arrow's one-byte bool, as they are stored."""
    if not isinstance(values.type, pa.BaseExtensionType):
        return values
    chunks: Any = values.chunks
    kind: Any = values.type.storage_type
    stored = [chunk.storage for chunk in chunks]
    return pa.chunked_array(stored, kind)


def _categories(values: Any) -> frozenset[str]:
    """Return the names in a dictionary column's dictionaries; numbers declare no class."""
    if not is_text(values.type.value_type):
        return frozenset()
    names: set[str] = set()
    for chunk in values.chunks:
        texts = readable_texts(chunk.dictionary)
        for name in texts.to_pylist():
            # A blank name is no label, see `_names`.
            if name is not None and name.strip():
                names.add(name)
    return frozenset(names)


def _names(values: Any) -> pa.StringArray:
    """Return names, null for those that are empty or blank."""
    texts = values.chunks
    # Arrow does not join an empty list.
    names = pa.array([], pa.string())
    if texts:
        names = pa.concat_arrays(texts)
    has_name = pc.match_substring_regex(names, r"\S")
    null = pa.scalar(None, pa.string())
    return pc.if_else(has_name, names, null)


def _whole(part: LabelPart, values: Any) -> Any:
    """Return fractions that are whole numbers as float64, NaN as null."""
    if pa.types.is_floating(values.type):
        # Arrow computes little with float16.
        values = values.cast(pa.float64())
        is_missing = pc.is_nan(values)
        null = pa.scalar(None, pa.float64())
        values = pc.if_else(is_missing, null, values)
    truncated = pc.trunc(values)
    is_whole = pc.equal(values, truncated)
    # Null is fine: an image may have no label.
    is_whole = is_whole.fill_null(True)
    _refuse(part, values, _mask(is_whole), "is not a whole number")
    # Infinite is whole to Arrow; the check of the range then refuses it.
    return values.cast(pa.float64())


def _check_range(part: LabelPart, values: Any) -> None:
    """Refuse numbers that are not class numbers."""
    # As float64, which is exact far beyond the limits: an unsigned column has no -1.
    filled = values.fill_null(0)
    numbers = filled.to_numpy().astype(np.float64)
    is_large_enough = numbers >= NO_LABEL
    is_small_enough = numbers <= _MAX_LABEL
    bounds: Any = pc.min_max(values).as_py()
    lowest = bounds["min"]
    highest = bounds["max"]
    problem = (
        f"is out of range: labels run from {lowest} to {highest}; expected 0 to 2^31 - 1, or -1 "
        "for an image without a label"
    )
    _refuse(part, values, is_large_enough & is_small_enough, problem)


def _refuse(
    part: LabelPart, values: Any, is_fine: npt.NDArray[np.bool_], problem: str
) -> None:
    """Name the first value that is not fine."""
    wrong = np.flatnonzero(~is_fine)
    if not len(wrong):
        return
    row = int(wrong[0])
    value = values[row].as_py()
    # People count rows from 1.
    number = row + 1
    num_others = len(wrong) - 1
    others = ""
    if num_others:
        others = f" and {num_others:,} others"
    described = part.describe()
    raise DataError(
        f"convert: {described}: the label {value} of image {number:,}{others} {problem}. "
        "Mend the column, choose another with --label-column, or give --labels none."
    )


def _mask(values: Any) -> npt.NDArray[np.bool_]:
    """Return Arrow's truth values as numpy's."""
    # Arrow packs them as bits, so a copy cannot be avoided.
    unpacked = values.to_numpy(zero_copy_only=False)
    return np.asarray(unpacked, np.bool_)


def _class_names(parts: Sequence[LabelPart]) -> list[str] | None:
    """Return the names of the numbers: the longest list, of which all others are the beginning."""
    names: list[str] = []
    shown = ""
    for part in parts:
        own = part.class_names or []
        # Hugging Face repeats the names in every file; a later version may have added classes.
        longer = max(own, names, key=len)
        pairs = zip(own, names, strict=False)
        for number, (own_name, name) in enumerate(pairs):
            if own_name == name:
                continue
            raise DataError(
                f"convert: label {number} is {own_name!r} in {part.shown} and {name!r} in "
                f"{shown}: the files number their classes differently. Convert them one by one, "
                "or give --labels none."
            )
        if longer is own:
            names = own
            shown = part.shown
    return names or None
