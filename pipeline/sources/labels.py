"""Labels of named images: from their folders, or from a ground truth; for those of tables see
`tables/label_column.py`.

A label is a class number; class names are numbered in sorted order, so that a train set and a val
set with the same classes agree.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.sources.ground_truth import read_ground_truth
from pipeline.sources.tables.label_column import Labels, no_labels, number_classes

LabelMode = Literal["auto", "folders", "none"]


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
    # A flat folder: no path tells a class.
    if not num_nested:
        if mode == "folders":
            raise ConfigError(
                f"convert: {storage.redact(uri)} has no folders to take classes from. Give "
                "--labels none, or a folder of class folders."
            )
        return no_labels(len(names))
    # A class for some images only would leave the others unlabelled without a word.
    if num_nested < len(names):
        loose = names.filter(pc.invert(in_folder))
        raise ConfigError(
            f"convert: {storage.redact(uri)} has {len(loose)} images beside its folders (such as "
            f"{loose[0]}) and {num_nested} in them, so their classes are unclear. Move the images "
            "beside the folders, or give --labels none."
        )
    return number_classes(pc.replace_substring_regex(names, "/.*", ""))
