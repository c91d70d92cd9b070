"""Where images come from before they are shards: what there is, in a fixed order, and its labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.shard_table import NO_LABEL

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""File names that are taken for images, in any case. What the file really is, its content tells."""
LabelMode = Literal["auto", "folders", "none"]
SourceKind = Literal["folder", "dataset"]


@dataclass(frozen=True)
class Listing:
    """The images of a source, sorted by name.

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

    def read(self, name: str) -> bytes:
        """Return one image's bytes."""

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return what is stored as JSON beside one image."""


class FolderSource:
    """A folder of class folders (the first folder of a path is its class), or a flat folder without labels.

    Hidden files and folders are passed over.

    Args:
        uri: The folder.
        labels: `folders`: the first folder is the class. `none`: no labels. `auto`: classes where every image lies in a
            folder, none where no image does.
    """

    def __init__(self, uri: str, *, labels: LabelMode = "auto") -> None:
        self.uri = uri
        self._labels = labels

    def read(self, name: str) -> bytes:
        """Return one image's bytes."""
        return storage.read_bytes(storage.join(self.uri, name))

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the file's name, and its class where it has one."""
        return {"filename": name} if class_name is None else {"filename": name, "class": class_name}

    def listing(self) -> Listing:
        """Return the folder's images by name.

        Raises:
            DataError: There is no such folder, or no image in it.
            ConfigError: Whether there are classes cannot be told.
        """
        if storage.exists(self.uri) and not storage.is_folder(self.uri):
            raise ConfigError(f"convert: {storage.redact(self.uri)} is a file. Give the folder that holds the images.")
        names: list[str] = []
        sizes: list[int] = []
        other: Counter[str] = Counter()
        for file in storage.list_files(self.uri, recursive=True):
            suffix = PurePosixPath(file.name).suffix.lower()
            hidden = file.name.startswith((".", "__MACOSX/")) or "/." in file.name
            if hidden or suffix not in IMAGE_SUFFIXES:
                other["hidden" if hidden else suffix or "no extension"] += 1
            elif not _is_utf8(file.name):
                other["name is not UTF-8"] += 1
            else:
                names.append(file.name)
                sizes.append(file.size_bytes)
        if not names:
            seen = ", ".join(f"{count} {suffix}" for suffix, count in other.most_common(5)) or "nothing"
            raise DataError(
                f"convert: no image in {storage.redact(self.uri)}; seen: {seen}. Looked for "
                f"{', '.join(IMAGE_SUFFIXES)}. (A folder of WebDataset tars can be trained on as it is; to convert it, "
                "first index it with pipeline.verify --write-manifest.)"
            )
        table = pa.array(names, pa.string())
        del names
        order = pc.sort_indices(table)
        sorted_names = table.take(order)
        labels, classes = self._label(sorted_names)
        return Listing(
            self.uri, sorted_names, np.array(sizes, np.int64)[order.to_numpy()], labels, classes, dict(other)
        )

    def _label(self, names: pa.StringArray) -> tuple[npt.NDArray[np.int32], list[str] | None]:
        in_folder = pc.match_substring(names, "/")
        num_nested = int(np.count_nonzero(in_folder.to_numpy(zero_copy_only=False)))
        mode = self._labels
        if mode != "none" and 0 < num_nested < len(names):
            loose = names.filter(pc.invert(in_folder))
            raise ConfigError(
                f"convert: {storage.redact(self.uri)} has {len(loose)} images beside its folders (such as {loose[0]}) "
                f"and {num_nested} in them, so the classes cannot be told. Move them, or give --labels none."
            )
        if mode == "folders" and not num_nested:
            raise ConfigError(f"convert: {storage.redact(self.uri)} has no folders to take classes from.")
        if mode == "none" or not num_nested:
            return np.full(len(names), NO_LABEL, np.int32), None
        folders = pc.replace_substring_regex(names, "/.*", "").dictionary_encode()
        found = [str(name) for name in folders.dictionary.to_pylist()]
        classes = sorted(found)
        number = {name: place for place, name in enumerate(classes)}
        codes = np.array([number[name] for name in found], np.int32)
        return codes[folders.indices.to_numpy()], classes


def open_source(uri: str, *, labels: LabelMode, kind: SourceKind | None = None) -> Source:
    """Return the source at a URI: a dataset, or a folder of images.

    Args:
        uri: A dataset has shards in it and `dataset.json`; betons need no `dataset.json`.
        labels: Where labels come from.
        kind: What it is, where that is known.
    """
    from pipeline.dataset_source import DatasetSource, is_dataset  # they need this module's names

    if kind is None:
        kind = "dataset" if is_dataset(uri) else "folder"
    return DatasetSource(uri, labels=labels) if kind == "dataset" else FolderSource(uri, labels=labels)


def sample_keys(names: pa.StringArray) -> pa.StringArray:
    """Return a unique key for each file name: the path without its extension, dots and blanks made underscores.

    Files that differ in nothing else get their extension, then their place in the list, added. The result depends on
    the sorted list alone.
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
