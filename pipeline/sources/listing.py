"""What a source holds, in a fixed order: names, sizes and labels of its images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict

from pipeline import storage
from pipeline.config import Settings
from pipeline.console import Progress, say
from pipeline.dataset.splits import split_of
from pipeline.errors import ConfigError
from pipeline.images.left_out import LeftOut
from pipeline.images.refused import Refused
from pipeline.options import Location
from pipeline.sources.labels import LabelMode, labels_of_names
from pipeline.sources.names import pick, why_skipped

SourceKind = Literal["folder", "dataset", "tar", "parquet", "list"]
QUIET_S = 3.0
"""Seconds that listing a source may take without a word about its progress."""
_REMOTE_READERS = 16
_CHUNK_FILES = 16_384
"""Names in a chunk: as Python objects they take ten times the memory that Arrow takes."""
_FOLDERS_AT_ONCE = 4_096
_SAY_EVERY_S = 10.0
FILE_OFFSET = np.dtype([("file", np.int32), ("offset", np.int64)])
"""Where an image lies inside a larger file: number of the file, byte at which the image starts."""


class SourceSettings(Settings):
    """What a source needs to be told. It shapes a shard only through names and labels, which the
    plan holds."""

    # The texts under the fields become their descriptions: the command line shows them as help.
    model_config = ConfigDict(use_attribute_docstrings=True)

    labels: LabelMode = "auto"
    """`folders`: the first folder of a path is the class. `none`: no labels. `auto`: the same as
    `folders` if every image lies in a folder, no labels if none does."""
    ground_truth: Location | None = None
    """Labels of a flat folder or tar: ImageNet's devkit (.tar.gz or folder), or a text file of
    classes."""
    synsets: Location | None = None
    """Class of each ILSVRC2012_ID, if `ground_truth` holds such numbers: the devkit's meta.mat, or
    a text file of lines such as `1 n02119789`."""
    image_column: str | None = None
    """Column of a table that holds the images or their URIs. None: chosen by its name."""
    label_column: str | None = None
    """Column of a table that holds the labels: whole numbers of any type, or names. Null, NaN, -1
    and empty text are no label. None: chosen by its name."""
    image_component: str | None = None
    """Member of a WebDataset's sample that is its image, for example image.jpg or 1.jpg. None: jpg,
    jpeg, png or webp."""


@dataclass(frozen=True)
class Wanted:
    """Images to read, in the order asked for.

    Args:
        names: As the listing has them.
        sizes: Bytes of each, as the listing has them.
        locations: Where each lies, as the listing has it; None if names are enough.
        files: URIs of the files that the locations count.
    """

    names: list[str]
    sizes: list[int] = field(default_factory=list)
    locations: npt.NDArray[np.void] | None = None
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Listing:
    """The images of a source, in an order that depends on the source alone.

    Args:
        uri: Of the source.
        names: Paths below it (Arrow, so that fourteen million take a gigabyte, not five).
        sizes: Bytes of each.
        labels: Class numbers, -1 for an image without one.
        classes: Class names by number; None if they have no names.
        passed_over: Other files, counted by reason.
        left_out: The same with names and notes.
        kind: What the source is.
        keys: The samples' keys; None if they are made from the names.
        bounds: First row of each shard, then the end, if the source has shards.
        fingerprint: Of the content, if the source knows it.
        locations: Where each image lies, as records of the source's own: a file's number and what
            lies in it. None if the name is enough.
        files: URIs of the files that the locations count.
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
    locations: npt.NDArray[np.void] | None = None
    files: tuple[str, ...] = ()
    runs: npt.NDArray[np.int64] | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    def wanted(self, rows: npt.NDArray[np.int64]) -> Wanted:
        """Return what `read_all` needs to know of some of the images."""
        # Only these rows: a task that is sent to a worker must not carry the whole listing.
        locations = None
        if self.locations is not None:
            locations = self.locations[rows]
        sizes = self.sizes[rows]
        return Wanted(
            names=pick(self.names, rows),
            sizes=sizes.tolist(),
            locations=locations,
            files=self.files,
        )

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Return a sha256 of all names, sizes and labels: the identity of what is converted."""
        digest = hashlib.sha256()
        label = f"Hashing the listing of {storage.name_of(self.uri)}"
        with Progress(
            label,
            total=len(self),
            after_s=QUIET_S,
        ) as progress:
            # A chunk at a time: fourteen million names as Python objects take gigabytes.
            for start in range(0, len(self), _CHUNK_FILES):
                end = start + _CHUNK_FILES
                names = self.names[start:end].to_pylist()
                text = "\0".join(str(name) for name in names)
                digest.update(text.encode())
                # Behind each chunk too, so that the digest does not depend on the chunks' size.
                digest.update(b"\0")
                progress.advance(len(names))
        # Fixed widths and byte order: a conversion may continue on another machine.
        sizes = self.sizes.astype("<i8")
        labels = self.labels.astype("<i4")
        class_names = "\0".join(self.classes or [])
        digest.update(sizes.tobytes())
        digest.update(labels.tobytes())
        digest.update(class_names.encode())
        digest.update(self.fingerprint.encode())
        return digest.hexdigest()


class Source(Protocol):
    """Something that images can be listed and read from."""

    def listing(self) -> Listing:
        """Return what there is."""

    def read_all(self, wanted: Wanted) -> Iterator[bytes | Refused]:
        """Yield the images' bytes in the order asked for, or the reason why one is not there."""

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return what is stored as JSON beside one image."""


def read_each(
    uri: str, read: Callable[[int], bytes | Refused], count: int
) -> Iterator[bytes | Refused]:
    """Yield `read(0)`, `read(1)` and so on; several are under way at a time if each is a request to
    a server."""
    if storage.is_local(uri):
        yield from map(read, range(count))
        return
    # In batches: `map` over all of them would read a whole shard into memory.
    batch = 4 * _REMOTE_READERS
    with ThreadPoolExecutor(_REMOTE_READERS, thread_name_prefix="read") as pool:
        for start in range(0, count, batch):
            end = min(count, start + batch)
            numbers = range(start, end)
            yield from pool.map(read, numbers)


def say_note(left_out: LeftOut, note: str) -> None:
    """Say at once what a person must know, and keep it for the end of the conversion.

    A long conversion without labels should be stopped at its start; a program reads the end.
    """
    say(f"convert: {note}")
    left_out.notes.append(note)


def name_and_class(name: str, class_name: str | None) -> dict[str, Any]:
    """Return what is stored beside an image of which no more is known."""
    # Only URIs can carry a secret; a file may be called anything.
    shown = name
    if "://" in name:
        shown = storage.redact(name)
    about = {"filename": shown}
    if class_name is not None:
        about["class"] = class_name
    return about


class ListingBuilder:
    """Collects named images as they are met, in any order; a million take some hundred megabytes at
    most.

    Args:
        uri: The source.
    """

    def __init__(self, uri: str) -> None:
        self.left_out = LeftOut()
        self._uri = uri
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._locations: list[tuple[int, int]] = []
        self._chunks: list[_Chunk] = []
        self._num_seen = 0
        self._said_s = time.monotonic()

    def __len__(self) -> int:
        num_closed = sum(len(chunk.names) for chunk in self._chunks)
        return num_closed + len(self._names)

    def add(
        self,
        name: str,
        size_bytes: int,
        *,
        file: int = -1,
        offset: int = -1,
    ) -> bool:
        """List a file if its name is an image's; count it as left out otherwise.

        Args:
            name: Path below the source.
            size_bytes: Of the file.
            file: Number of the file that the image lies in, if it is not a file of its own.
            offset: Byte at which it starts in there.

        Returns:
            Whether it is listed.
        """
        self._report()
        reason = why_skipped(name)
        if reason is not None:
            self.left_out.add(reason, name)
            return False
        self._names.append(name)
        self._sizes.append(size_bytes)
        # A folder's images are files of their own: without a place they take half the memory.
        if file >= 0:
            self._locations.append((file, offset))
        if len(self._names) == _CHUNK_FILES:
            self._close_chunk()
        return True

    def _report(self) -> None:
        """Say now and then how many files were seen. Nobody knows their number: there is no ETA."""
        self._num_seen += 1
        if self._num_seen % 1000:  # a look at the clock takes as long as the rest
            return
        now_s = time.monotonic()
        if now_s - self._said_s > _SAY_EVERY_S:
            self._said_s = now_s
            source_name = storage.name_of(self._uri)
            say(f"Listing {source_name}: {self._num_seen:,} files so far")

    def _close_chunk(self) -> None:
        chunk = _Chunk(
            names=pa.array(self._names, pa.string()),
            sizes=np.array(self._sizes, np.int64),
            locations=np.array(self._locations, FILE_OFFSET),
        )
        self._chunks.append(chunk)
        self._names = []
        self._sizes = []
        self._locations = []

    def seen(self) -> str:
        """Return what was passed over, for an error message."""
        most = self.left_out.counts.most_common(5)
        words = [f"{count} {reason}" for reason, count in most]
        if not words:
            return "no files"
        return ", ".join(words)

    def build(
        self, settings: SourceSettings, *, kind: SourceKind, files: tuple[str, ...] = ()
    ) -> Listing:
        """Return the images sorted by name, labelled as the settings say.

        Args:
            settings: Where labels come from.
            kind: Of the source.
            files: URIs of the files that the locations count; empty if every image is a file.
        """
        self._close_chunk()
        names = pa.concat_arrays([chunk.names for chunk in self._chunks])
        sizes = np.concatenate([chunk.sizes for chunk in self._chunks])
        locations = np.concatenate([chunk.locations for chunk in self._chunks])
        # Here and not at the end: what comes next copies names, and millions of them lie in chunks.
        self._chunks = []
        # Storage lists in any order; a listing's order must depend on the source alone.
        order = pc.sort_indices(names)
        names = names.take(order)
        rows = order.to_numpy()
        if settings.labels == "auto" and settings.ground_truth is None:
            _refuse_splits(self._uri, names, kind)
        labels, classes = labels_of_names(
            self._uri,
            names,
            settings.labels,
            ground_truth=settings.ground_truth,
            synsets=settings.synsets,
        )
        return Listing(
            uri=self._uri,
            names=names,
            sizes=sizes[rows],
            labels=labels,
            classes=classes,
            passed_over=dict(self.left_out.counts),
            kind=kind,
            locations=locations[rows] if files else None,
            files=files,
            left_out=self.left_out,
        )


def _refuse_splits(uri: str, names: pa.StringArray, kind: SourceKind) -> None:
    """Refuse folders of train and validation images as classes: they are not one dataset.

    Raises:
        ConfigError: All folders are called like splits, or two different splits are among them.
    """
    prefix = ""
    folders = _first_folders(names)
    # data/images/train and data/images/val: the folder that all lie in says no more than its own.
    while folders is not None and len(folders) == 1 and split_of(folders[0]) is None:
        prefix = f"{prefix}{folders[0]}/"
        names = pc.replace_substring_regex(names, "^[^/]*/", "")
        folders = _first_folders(names)
    if folders is None:
        return

    # A class may be called `train`: beside cars and ships it is one.
    splits = {folder: split_of(folder) for folder in folders}
    named = sorted(folder for folder, split in splits.items() if split is not None)
    has_several = len({splits[folder] for folder in named}) > 1
    if not named or not (has_several or len(named) == len(folders)):
        return
    paths = [storage.redact(storage.join(uri, prefix + folder)) for folder in named]
    advice = ", ".join(paths) if kind == "folder" else "unpacked"
    raise ConfigError(
        f"convert: {storage.redact(uri)} holds the folders {', '.join(named)}, which are splits of "
        f"a data set and not classes. Give one of them: {advice}. If they are classes, give "
        "--labels folders; for one dataset of all images without labels, --labels none."
    )


def _first_folders(names: pa.StringArray) -> list[str] | None:
    """Return the first folders of paths, sorted; None if one path has none."""
    folders: set[str] = set()
    # A piece at a time: the folders of all paths at once take as much memory as the paths.
    for start in range(0, len(names), _FOLDERS_AT_ONCE):
        piece = names.slice(start, _FOLDERS_AT_ONCE)
        if not pc.all(pc.match_substring(piece, "/")).as_py():
            return None
        first = pc.unique(pc.replace_substring_regex(piece, "/.*", ""))
        folders.update(str(folder) for folder in first.to_pylist())
    return sorted(folders)


@dataclass(frozen=True)
class _Chunk:
    """Some listed images."""

    names: pa.StringArray
    sizes: npt.NDArray[np.int64]
    locations: npt.NDArray[np.void]
