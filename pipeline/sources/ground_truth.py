"""Labels that are kept apart from the images: ImageNet's validation set, whose tar has no folders.

A class number is the position of a class name in sorted order, as it is for folders: a train set of
folders or class tars and a val set labelled here agree. ImageNet's own ILSVRC2012_ID counts in
another order, which only the devkit's `meta.mat`, or a list made from it, translates.
"""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.formats.tar import TarScanner

_LABELS_FILE = "ILSVRC2012_validation_ground_truth.txt"
_META_FILE = "meta.mat"
_MAX_FILE_BYTES = 64 * 2**20
_HEADERS = frozenset(
    {
        "imageid",
        "image_id",
        "image",
        "image_name",
        "filename",
        "file_name",
        "file",
        "path",
        "img",
    }
)
"""First words of a line that names columns, in lower case."""
_HOW = (
    "Give the devkit (ILSVRC2012_devkit_t12.tar.gz or its folder), or a text file with a class "
    "name such as n01440764 "
    "a line, in the order of the images' names, or with an image's name and its class a line."
)


@dataclass(frozen=True)
class GroundTruth:
    """Class names of images, in the order of the images' names, or by the images' names.

    Args:
        shown: What to call it in errors.
        names: Of the classes, sorted.
        in_order: A class an image.
        by_name: Classes by the images' names without extension.
    """

    shown: str
    names: list[str]
    in_order: list[str]
    by_name: dict[str, str]

    def label(self, names: pa.StringArray) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Return the class number of each image, and the class names.

        Args:
            names: Of the images, sorted.

        Raises:
            DataError: There is no class for an image.
        """
        number: dict[str, int] = {}
        for position, class_name in enumerate(self.names):
            number[class_name] = position
        if self.in_order:
            # One line too few would shift every label behind it.
            if len(self.in_order) != len(names):
                raise DataError(
                    f"convert: {self.shown} has the classes of {len(self.in_order)} images, but "
                    f"there are {len(names)}. Use the file that belongs to these images."
                )
            numbers = [number[name] for name in self.in_order]
            return np.array(numbers, np.int32), self.names

        labels = np.empty(len(names), np.int32)
        for row, name in enumerate(names.to_pylist()):
            stem = PurePosixPath(str(name)).stem
            if stem not in self.by_name:
                raise DataError(
                    f"convert: {self.shown} has no class for {name}. Use the file for these images."
                )
            labels[row] = number[self.by_name[stem]]
        return labels, self.names


def read_ground_truth(uri: str, synsets: str | None = None) -> GroundTruth:
    """Read the classes of a set of images.

    Args:
        uri: ImageNet's devkit, packed or not, or a text file: an ILSVRC2012_ID or a class name a
            line in the order of the images' names, or an image's name and its class a line (blank
            or comma between; the rest is ignored).
        synsets: `meta.mat`, or a text file whose line k is the class with ILSVRC2012_ID k, or `ID
            class` lines. Needed if a text file holds numbers.

    Raises:
        ConfigError: Numbers without the list that says what they mean; scipy is missing for
            `meta.mat`.
        DataError: There is no such file, or it cannot be understood.
    """
    shown = storage.redact(uri)
    files = _devkit(uri)
    if files:
        wanted = [_LABELS_FILE]
        # The list of classes may be given apart.
        if not synsets:
            wanted.append(_META_FILE)
        missing = [name for name in wanted if name not in files]
        if missing:
            raise DataError(
                f"convert: {shown} does not hold {' and '.join(missing)}. {_HOW}"
            )
        meta = storage.read_bytes(synsets) if synsets else files[_META_FILE]
        classes = _read_synsets(meta, shown=storage.redact(synsets or uri))
        numbers = _text(files[_LABELS_FILE], shown).split()
        return _numbered(numbers, classes, shown=shown)
    return _read_text(storage.read_bytes(uri), synsets, shown=shown)


def _read_text(data: bytes, synsets: str | None, *, shown: str) -> GroundTruth:
    """Read a text file: a number or a name per line, or an image's name and its class."""
    rows: list[list[str]] = []
    for line in _text(data, shown).splitlines():
        if line.strip():
            rows.append(re.split(r"[\s,]+", line.strip()))
    # A header taken for an image would add a class called `label` and shift those behind it.
    if rows and rows[0][0].lower() in _HEADERS:
        rows = rows[1:]
    if not rows:
        raise DataError(f"convert: {shown} is empty. {_HOW}")

    if all(len(row) == 1 for row in rows):
        words = [row[0] for row in rows]
        if not all(word.isdecimal() for word in words):
            return GroundTruth(shown, sorted(set(words)), words, {})
        if synsets is None:
            raise ConfigError(
                f"convert: {shown} holds numbers, which are ILSVRC2012_IDs and not places in the "
                "sorted class names, so labels would not agree with those of the train set. Give "
                "--synsets meta.mat, or the whole devkit as --ground-truth."
            )
        classes = _read_synsets(
            storage.read_bytes(synsets), shown=storage.redact(synsets)
        )
        return _numbered(words, classes, shown=shown)

    # Names with numbers: lists of other projects, numbered in an order that nobody states.
    is_short = any(len(row) < 2 for row in rows)
    if is_short or all(row[1].isdecimal() for row in rows):
        raise DataError(
            f"convert: {shown} cannot be understood: {' '.join(rows[0])!r}. {_HOW}"
        )
    by_name: dict[str, str] = {}
    for name, class_name in (row[:2] for row in rows):
        stem = PurePosixPath(name).stem
        # Images are found by their names without folder: two classes for one name are no answer.
        if by_name.setdefault(stem, class_name) != class_name:
            raise DataError(
                f"convert: {shown} gives {stem!r} the classes {by_name[stem]!r} and "
                f"{class_name!r}. Images of one name in several folders cannot be labelled by a "
                "text file: give a CSV list of paths and labels as the source."
            )
    return GroundTruth(shown, sorted(set(by_name.values())), [], by_name)


def _numbered(
    numbers: list[str], classes: dict[int, str], *, shown: str
) -> GroundTruth:
    in_order: list[str] = []
    for text in numbers:
        name = classes.get(int(text)) if text.isdecimal() else None
        if name is None:
            raise DataError(
                f"convert: {shown} has the class number {text!r}, which is not in the list of "
                "classes. Use the list that belongs to it."
            )
        in_order.append(name)
    # All classes of the list, even those without an image here: numbers must agree with the train
    # set's.
    return GroundTruth(shown, sorted(classes.values()), in_order, {})


def _devkit(uri: str) -> dict[str, bytes]:
    """Return the two files of a devkit that matter, or an empty dict if it is not a devkit."""
    wanted = (_LABELS_FILE, _META_FILE)
    name = storage.name_of(uri).lower()
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        with storage.open_read(uri) as packed:
            plain = packed
            if not name.endswith(".tar"):
                plain = cast(BinaryIO, gzip.GzipFile(fileobj=packed))
            try:
                return dict(
                    _unpack(TarScanner(plain, shard=storage.redact(uri)), wanted)
                )
            except (gzip.BadGzipFile, EOFError) as error:
                raise DataError(
                    f"convert: {storage.redact(uri)} is damaged ({error}). Download it again."
                ) from error
    if not uri.startswith("https:") and storage.is_folder(uri):
        files = storage.list_files(uri, recursive=True)
        found: dict[str, bytes] = {}
        for file in files:
            file_name = storage.name_of(file.name)
            if file_name in wanted:
                found[file_name] = storage.read_bytes(file.uri)
        # A folder is a devkit even if it lacks both files: the error then says what is missing.
        return found or {"": b""}
    return {}


def _unpack(
    scanner: TarScanner, wanted: tuple[str, ...]
) -> Iterator[tuple[str, bytes]]:
    # An archive is a devkit even if it lacks both files: the error then says what is missing.
    yield "", b""
    for member in scanner:
        name = member.name.rsplit("/", 1)[-1]
        if name in wanted and member.size <= _MAX_FILE_BYTES:
            yield name, scanner.read()


def _read_synsets(data: bytes, *, shown: str) -> dict[int, str]:
    """Return class names by ILSVRC2012_ID."""
    if data.startswith(b"MATLAB"):
        return _read_meta(data, shown=shown)
    lines = _text(data, shown).splitlines()
    rows = [line.split() for line in lines if line.strip()]
    has_ids = [len(row) >= 2 and row[0].isdecimal() for row in rows]
    if rows and all(has_ids):
        return {int(row[0]): row[1] for row in rows}
    names = [row[0] for row in rows]
    # A list sorted by name would be taken for one sorted by ID, and every label would be wrong.
    if len(names) > 2 and names == sorted(names):
        raise DataError(
            f"convert: {shown} lists the classes in sorted order, but ILSVRC2012_IDs count in "
            "another. Use meta.mat of the devkit, or lines of an ID and a class, for example "
            "`1 n02119789`."
        )
    return dict(enumerate(names, start=1))


def _read_meta(data: bytes, *, shown: str) -> dict[int, str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ConfigError(
            "convert: reading meta.mat needs scipy, which is not installed (pip install -c "
            "constraints.txt scipy). Or "
            "give --synsets a text file with `ILSVRC2012_ID class` a line."
        ) from None
    try:
        variables: Any = loadmat(
            io.BytesIO(data), squeeze_me=True, variable_names=["synsets"]
        )
        table = variables["synsets"]
        rows = zip(
            table["ILSVRC2012_ID"],
            table["WNID"],
            table["num_children"],
            strict=True,
        )
        classes: dict[int, str] = {}
        for number, wnid, num_children in rows:
            # Classes are the leaves; the rest are the groups they fall into.
            if int(num_children) == 0:
                classes[int(number)] = str(wnid)
        return classes
    except (ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise DataError(
            f"convert: {shown} is not ImageNet's meta.mat ({type(error).__name__}: {error})."
        ) from error


def _text(data: bytes, shown: str) -> str:
    """Return a file's text; spreadsheets on Windows write a mark before it."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"convert: {shown} is not a text file in UTF-8 (line {line}: byte "
            f"0x{data[error.start]:02x}). {_HOW}"
        ) from None
