"""Where images come from before they are shards: what there is, in a fixed order, and its
labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict

from pipeline import storage
from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.formats.table import NO_LABEL

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
)
"""File names that are taken for images, in any case. What the file really is, its content tells."""
LabelMode = Literal["auto", "folders", "none"]
SourceKind = Literal["folder", "dataset", "tar", "parquet", "list"]
_REMOTE_READERS = 16
_LISTED_AT_ONCE = 16_384


class SourceSettings(Settings):
    """What a source needs to be told. It shapes a shard only through names and labels, which the
    plan holds."""

    # The texts under the fields become their descriptions: the command line shows them as help.
    model_config = ConfigDict(use_attribute_docstrings=True)

    labels: LabelMode = "auto"
    """`folders`: the first folder of a path is the class. `none`: no labels. `auto`: the same as
    `folders` if every image lies in a folder, no labels if none does."""
    ground_truth: str | None = None
    """Labels of a flat folder or tar: ImageNet's devkit (.tar.gz or folder), or a text file of
    classes."""
    synsets: str | None = None
    """Class of each ILSVRC2012_ID, if `ground_truth` holds such numbers: the devkit's meta.mat, or
    a text file of lines such as `1 n02119789`."""
    image_column: str | None = None
    """Column of a table that holds the images or their URIs. None: chosen by its name."""
    label_column: str | None = None
    """Column of a table that holds the labels. None: chosen by its name."""


@dataclass(frozen=True)
class Wanted:
    """Images to read, in the order asked for.

    Args:
        names: As the listing has them.
        places: Where each lies, as the listing has it; empty where names are enough.
        sizes: Bytes of each, as the listing has them.
        files: What the places point into.
    """

    names: list[str]
    places: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Listing:
    """The images of a source, in an order that depends on the source alone.

    Args:
        uri: Where the source is.
        names: Paths below it (Arrow, so that fourteen million take a gigabyte, not five).
        sizes: Bytes of each.
        labels: Class numbers, -1 where there are none.
        classes: Class names by number, or nothing.
        passed_over: Other files, counted by suffix.
        kind: What the source is.
        keys: The samples' keys where they are given, not made from the names.
        bounds: Where shards begin and end, in a source that has shards.
        fingerprint: Of the content, where the source knows it.
        places: Where each image lies, in the source's own count, where its name does not tell.
        files: What the places point into.
        runs: Bounds of the runs of images that can only be read together, such as Parquet's row
            groups.
    """

    uri: str
    names: pa.StringArray
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    classes: list[str] | None
    passed_over: dict[str, int]
    kind: SourceKind = "folder"
    keys: pa.StringArray | None = None
    bounds: npt.NDArray[np.int64] | None = None
    fingerprint: str = ""
    places: npt.NDArray[np.int64] | None = None
    files: tuple[str, ...] = ()
    runs: npt.NDArray[np.int64] | None = None

    def wanted(self, rows: npt.NDArray[np.int64]) -> Wanted:
        """Return what `read_all` needs to know of some of the images."""
        return Wanted(
            names=pick(self.names, rows),
            places=[] if self.places is None else self.places[rows].tolist(),
            sizes=self.sizes[rows].tolist(),
            files=self.files,
        )

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Return a sha256 of all names, sizes and labels: the identity of what is converted."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 65_536):
            part = "\0".join(map(str, self.names[start : start + 65_536].to_pylist()))
            digest.update(part.encode() + b"\0")
        digest.update(self.sizes.astype("<i8").tobytes())
        digest.update(self.labels.astype("<i4").tobytes())
        digest.update("\0".join(self.classes or []).encode())
        digest.update(self.fingerprint.encode())
        return digest.hexdigest()


class Source(Protocol):
    """Something that images can be listed and read from."""

    def listing(self) -> Listing:
        """Return what there is."""

    def read_all(self, wanted: Wanted) -> Iterator[bytes | str]:
        """Yield the images' bytes in the order asked for, or the reason why one is not there."""

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return what is stored as JSON beside one image."""


def read_each(uri: str, read: Callable[[int], bytes | str], count: int) -> Iterator[bytes | str]:
    """Yield `read(0)`, `read(1)` and so on; several are under way at a time where each is a request
    to a server."""
    if storage.is_local(uri):
        yield from map(read, range(count))
        return
    with ThreadPoolExecutor(_REMOTE_READERS, thread_name_prefix="read") as pool:
        for start in range(0, count, 4 * _REMOTE_READERS):
            yield from pool.map(read, range(start, min(count, start + 4 * _REMOTE_READERS)))


def name_and_class(name: str, class_name: str | None) -> dict[str, Any]:
    """Return what is stored beside an image of which no more is known."""
    about = {"filename": storage.redact(name) if "://" in name else name}
    return about if class_name is None else {**about, "class": class_name}


class ListingBuilder:
    """Collects named images as they are met, in any order; a million take some hundred megabytes at
    most."""

    def __init__(self) -> None:
        self.passed_over: Counter[str] = Counter()
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._places: list[int] = []
        self._chunks: list[tuple[pa.StringArray, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []

    def __len__(self) -> int:
        return len(self._names) + sum(len(chunk[0]) for chunk in self._chunks)

    def add(self, name: str, size_bytes: int, *, place: int = -1) -> None:
        """Take a file where its name is an image's, and count it where it is not."""
        suffix = PurePosixPath(name).suffix.lower()
        hidden = name.startswith((".", "__MACOSX/")) or "/." in name
        if hidden or suffix not in IMAGE_SUFFIXES:
            self.passed_over["hidden" if hidden else suffix or "no extension"] += 1
        elif not _is_utf8(name):
            self.passed_over["name is not UTF-8"] += 1
        else:
            self._names.append(name)
            self._sizes.append(size_bytes)
            self._places.append(place)
            if len(self._names) == _LISTED_AT_ONCE:
                self._close_chunk()

    def _close_chunk(self) -> None:
        self._chunks.append(
            (
                pa.array(self._names, pa.string()),
                np.array(self._sizes, np.int64),
                np.array(self._places, np.int64),
            )
        )
        self._names, self._sizes, self._places = [], [], []

    def seen(self) -> str:
        """Return what was passed over, for an error message."""
        return (
            ", ".join(f"{count} {suffix}" for suffix, count in self.passed_over.most_common(5))
            or "nothing"
        )

    def build(
        self, uri: str, settings: SourceSettings, *, kind: SourceKind, files: tuple[str, ...] = ()
    ) -> Listing:
        """Return the images sorted by name, labelled as the settings say."""
        from pipeline.sources.ground_truth import read_ground_truth

        self._close_chunk()
        names = pa.concat_arrays([chunk[0] for chunk in self._chunks])
        order = pc.sort_indices(names)
        names = names.take(order)
        rows = order.to_numpy()
        found: tuple[npt.NDArray[np.int32], list[str] | None]
        if settings.ground_truth is not None and settings.labels != "none":
            found = read_ground_truth(settings.ground_truth, settings.synsets).label(names)
        else:
            found = label_by_folder(uri, names, settings.labels)
        labels, classes = found
        return Listing(
            uri=uri,
            names=names,
            sizes=np.concatenate([chunk[1] for chunk in self._chunks])[rows],
            labels=labels,
            classes=classes,
            passed_over=dict(self.passed_over),
            kind=kind,
            places=np.concatenate([chunk[2] for chunk in self._chunks])[rows] if files else None,
            files=files,
        )


def label_by_folder(
    uri: str, names: pa.StringArray, mode: LabelMode
) -> tuple[npt.NDArray[np.int32], list[str] | None]:
    """Return class numbers and names, where the first folder of a path is its class.

    Raises:
        ConfigError: Some images lie in folders and some do not.
    """
    in_folder = pc.match_substring(names, "/")
    num_nested = int(np.count_nonzero(in_folder.to_numpy(zero_copy_only=False)))
    if mode != "none" and 0 < num_nested < len(names):
        loose = names.filter(pc.invert(in_folder))
        raise ConfigError(
            f"convert: {storage.redact(uri)} has {len(loose)} images beside its folders (such as "
            f"{loose[0]}) "
            f"and {num_nested} in them, so the classes cannot be told. Move them, or give --labels "
            "none."
        )
    if mode == "folders" and not num_nested:
        raise ConfigError(f"convert: {storage.redact(uri)} has no folders to take classes from.")
    if mode == "none" or not num_nested:
        return np.full(len(names), NO_LABEL, np.int32), None
    return number_classes(pc.replace_substring_regex(names, "/.*", ""))


def number_classes(texts: pa.Array[Any]) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return class numbers and names: names in sorted order, -1 where there is none."""
    encoded = texts.dictionary_encode()
    found = [str(name) for name in encoded.dictionary.to_pylist()]
    classes = sorted(found)
    number = {name: place for place, name in enumerate(classes)}
    codes = np.array([*(number[name] for name in found), NO_LABEL], np.int32)
    return codes[encoded.indices.fill_null(len(found)).to_numpy(zero_copy_only=False)], classes


def sample_keys(names: pa.StringArray) -> pa.StringArray:
    """Return a unique key for each file name: the path without its extension, dots and blanks made
    underscores.

    Files that differ in nothing else get their extension, then their place in the list, added. The
    result depends on the sorted list alone.
    """
    keys = pc.replace_substring_regex(names, r"\.[^./]*$", "")
    keys = pc.replace_substring_regex(keys, r"[.\s\p{Z}\p{C}]", "_")
    keys = pc.replace_substring_regex(keys, r"^__+", "_")
    suffixes = pc.utf8_lower(pc.replace_substring_regex(names, r"^.*\.", "-"))
    for extra in (suffixes, pa.array([f"-{place}" for place in range(len(names))])):
        twice = _repeated(keys)
        if not twice.any():
            return keys
        keys = _append(keys, extra, where=twice)
    while (twice := _repeated(keys)).any():
        keys = _append(keys, pa.scalar("-"), where=twice)
    return keys


def pick(texts: pa.StringArray, places: npt.NDArray[np.int64]) -> list[str]:
    """Return some of the texts, in the order asked for."""
    return [str(text) for text in texts.take(pa.array(places, pa.int64())).to_pylist()]


def _append(keys: pa.StringArray, ending: Any, *, where: npt.NDArray[np.bool_]) -> pa.StringArray:
    join: Any = pc.binary_join_element_wise  # its stubs know arrays only
    return pc.if_else(pa.array(where), join(keys, ending, pa.scalar("")), keys)


def _repeated(keys: pa.StringArray) -> npt.NDArray[np.bool_]:
    """Return which keys another file has too."""
    encoded = keys.dictionary_encode()
    codes = encoded.indices.to_numpy()
    return np.bincount(codes, minlength=len(encoded.dictionary))[codes] > 1


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
