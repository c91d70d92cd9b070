"""The one place in which labels are made: from folders, a ground truth, or a column of a table.

A label is a class number; class names are numbered in sorted order, so that a train set and a val
set with the same classes agree.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.formats.table import NO_LABEL
from pipeline.sources.ground_truth import read_ground_truth

LabelMode = Literal["auto", "folders", "none"]
Labels = tuple[npt.NDArray[np.int32], list[str] | None]
"""Class number of each image, -1 if it has none, and the class names; None without names."""


def no_labels(count: int) -> Labels:
    """Return the labels of images without classes."""
    return np.full(count, NO_LABEL, np.int32), None


def labels_of_names(
    uri: str,
    names: pa.StringArray,
    mode: LabelMode,
    *,
    ground_truth: str | None = None,
    synsets: str | None = None,
) -> Labels:
    """Return the labels of named images.

    Args:
        uri: The source, for errors.
        names: Paths below it, sorted.
        mode: `none` ignores a ground truth too.
        ground_truth: URI of labels that are kept apart from the images.
        synsets: URI of what the numbers in the ground truth mean.

    Raises:
        ConfigError: It is unclear whether there are classes.
        DataError: The ground truth does not fit the images.
    """
    if mode == "none":
        return no_labels(len(names))
    if ground_truth is not None:
        return read_ground_truth(ground_truth, synsets).label(names)
    return _labels_of_folders(uri, names, mode)


def _labels_of_folders(uri: str, names: pa.StringArray, mode: LabelMode) -> Labels:
    """Take the first folder of a path as its class."""
    in_folder = pc.match_substring(names, "/")
    num_nested = int(np.count_nonzero(in_folder.to_numpy(zero_copy_only=False)))
    if not num_nested:
        if mode == "folders":
            raise ConfigError(
                f"convert: {storage.redact(uri)} has no folders to take classes from. Give "
                "--labels none, or a folder of class folders."
            )
        return no_labels(len(names))
    if num_nested < len(names):
        loose = names.filter(pc.invert(in_folder))
        raise ConfigError(
            f"convert: {storage.redact(uri)} has {len(loose)} images beside its folders (such as "
            f"{loose[0]}) and {num_nested} in them, so their classes are unclear. Move the images "
            "beside the folders, or give --labels none."
        )
    return number_classes(pc.replace_substring_regex(names, "/.*", ""))


def labels_of_column(values: pa.ChunkedArray, class_names: list[str] | None) -> Labels:
    """Return the labels in a column of a table: numbers are kept, names are numbered.

    Args:
        values: One value per image.
        class_names: Names that the table gives its numbers, if it does.

    Raises:
        ConfigError: The column holds neither numbers nor names.
        DataError: A number cannot be a label.
    """
    if pa.types.is_null(values.type):
        return no_labels(len(values))
    if pa.types.is_integer(values.type):
        given: Any = values
        numbers = given.fill_null(NO_LABEL).to_numpy().astype(np.int64)
        if len(numbers) and (numbers.min() < NO_LABEL or numbers.max() >= 2**31):
            raise DataError(
                f"convert: labels run from {numbers.min()} to {numbers.max()}; expected 0 to "
                "2^31 - 1, or -1 for an image without a label."
            )
        return numbers.astype(np.int32), class_names
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        texts = values.cast(pa.string()).chunks or [pa.array([], pa.string())]
        return number_classes(pa.concat_arrays(texts))
    raise ConfigError(
        f"convert: the label column holds {values.type}; expected whole numbers or names. Choose "
        "another with --label-column, or give --labels none."
    )


def number_classes(texts: pa.Array[Any]) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Number class names in sorted order.

    Returns:
        The class number of each text, -1 for null, and the class names.
    """
    encoded = texts.dictionary_encode()
    names = [str(name) for name in encoded.dictionary.to_pylist()]
    classes = sorted(names)
    number_of = {name: number for number, name in enumerate(classes)}
    # Arrow numbers names as it meets them. The extra last code stands for null.
    codes = np.array([*(number_of[name] for name in names), NO_LABEL], np.int32)
    met = encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
    return codes[met], classes
