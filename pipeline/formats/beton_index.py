"""FFCV shards: samples as slices of a `.beton`, whoever wrote it; images in JPEG or raw pixels.

Keys and labels: of a beton made here, from its `meta` and `label` fields. Of another: the key is
what its JSON or bytes field holds, or the file's name and the sample's number; the label is the
field `label`, or the only integer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats import beton
from pipeline.formats.records import SUFFIXES, ShardFile, ShardIndex
from pipeline.formats.table import NO_LABEL, ShardTable, TableBuilder
from pipeline.images.header import Probe, probe
from pipeline.images.refused import Reason, Refused

_CHUNK_BYTES = 2**20
_MAX_SAMPLES = 2**32
_MAX_TEXT_BYTES = 2**20


@dataclass
class Layout:
    """What the tables of a beton say.

    Args:
        image: Mode, width, height and place of each sample's image.
        sizes: Bytes of each image.
        labels: Class numbers.
        texts: Place and size of the JSON or bytes field that may hold the keys, where there is one.
        texts_are_json: Whether it is JSON.
        ignored: Fields that are not read, by reason.
    """

    image: npt.NDArray
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    texts: npt.NDArray | None
    texts_are_json: bool
    ignored: dict[str, int] = field(default_factory=dict)


def read_layout(file: BinaryIO, *, name: str, size_bytes: int) -> Layout:
    """Read a beton's tables.

    Args:
        file: The beton, seekable.
        name: What to call it in errors.
        size_bytes: Its size.

    Raises:
        DataError: It is no beton, of another version, cut, or has no image field.
    """
    head = _exactly(file, 0, beton.HEADER.itemsize, name).view(beton.HEADER)[0]
    if head["version"] != beton.VERSION:
        raise DataError(
            f"{name}: not a beton of version {beton.VERSION} (found {head['version']}). Write it "
            "again."
        )
    count, num_fields, table_at = (
        int(head["num_samples"]),
        int(head["num_fields"]),
        int(head["alloc_table_ptr"]),
    )
    left = size_bytes - table_at
    if (
        not 0 < count < _MAX_SAMPLES
        or not 0 < table_at <= size_bytes
        or left % beton.ALLOCATION.itemsize
    ):
        raise DataError(
            f"{name}: the beton is empty, cut or was never finished: {count} samples, allocations "
            f"at byte {table_at} "
            f"of {size_bytes}. Copy it again from its source, or write it again."
        )
    descriptions = _exactly(
        file, beton.HEADER.itemsize, num_fields * beton.FIELD.itemsize, name
    ).view(beton.FIELD)
    fields = beton.fields_of(descriptions)
    unknown = [entry.name for entry in fields if entry.type_id not in beton.FIELD_ROWS]
    if unknown:
        raise DataError(
            f"{name}: field {unknown[0]!r} is of a custom kind, so the samples' rows cannot be "
            "read."
        )
    dtype = beton.row_dtype([entry.type_id for entry in fields])
    rows = _exactly(
        file, beton.HEADER.itemsize + descriptions.nbytes, count * dtype.itemsize, name
    ).view(dtype)
    allocations = _exactly(file, table_at, left, name).view(beton.ALLOCATION)
    names = dtype.names or ()
    images = [i for i, entry in enumerate(fields) if entry.type_id == beton.IMAGE]
    if not images:
        raise DataError(f"{name}: no image field among {[entry.name for entry in fields]}.")
    image = rows[names[images[0]]]
    used = {images[0]}
    labels = np.full(count, NO_LABEL, np.int64)
    label = _choose(fields, (beton.INT,), "label")
    if label is not None:
        labels = rows[names[label]].astype(np.int64)
        used.add(label)
    text = _choose(fields, (beton.JSON, beton.BYTES), "meta", "key")
    if text is not None:
        used.add(text)
        texts = rows[names[text]]
        held = texts[texts["size"] > 0]
        if (_sizes(held["ptr"], allocations, name) != held["size"]).any():
            raise DataError(
                f"{name}: the beton's tables disagree about a sample's texts. Write it again."
            )
    ignored = Counter(f"field {entry.name!r}" for i, entry in enumerate(fields) if i not in used)
    return Layout(
        image=image,
        sizes=_sizes(image["data_ptr"], allocations, name),
        labels=labels,
        texts=None if text is None else rows[names[text]],
        texts_are_json=text is not None and fields[text].type_id == beton.JSON,
        ignored=dict(ignored),
    )


def _choose(fields: list[beton.Field], kinds: tuple[int, ...], *names: str) -> int | None:
    """Return the field of one of these kinds that has one of these names, or the only one of these
    kinds."""
    fitting = [i for i, entry in enumerate(fields) if entry.type_id in kinds]
    named = [i for i in fitting if fields[i].name in names]
    return named[0] if named else fitting[0] if len(fitting) == 1 else None


def _exactly(file: BinaryIO, start: int, size: int, name: str) -> npt.NDArray[np.uint8]:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise DataError(
            f"{name}: the beton ends at byte {start + len(data)}, inside its tables. Copy it again "
            "from its source."
        )
    return np.frombuffer(data, np.uint8)


def _sizes(places: npt.NDArray, allocations: npt.NDArray, name: str) -> npt.NDArray[np.int64]:
    """Return the bytes at each place: the allocation that begins there."""
    order = np.argsort(allocations["ptr"], kind="stable")
    starts = allocations["ptr"][order]
    found = np.searchsorted(starts, places).clip(max=max(len(starts) - 1, 0))
    if len(places) and (not len(starts) or (starts[found] != places).any()):
        raise DataError(
            f"{name}: a sample lies where nothing was allocated; the beton was cut or damaged. "
            "Copy it again from its "
            "source, or write it again."
        )
    return allocations["size"][order][found].astype(np.int64)


def index_shard(uri: str) -> ShardIndex:
    """Read a beton once, from end to end, and return its samples' places, sizes and hashes.

    Raises:
        DataError: It is no beton, cut or damaged.
    """
    name = storage.redact(uri)
    size_bytes = storage.size_of(uri)
    with storage.open_read(uri) as file:
        layout = read_layout(file, name=name, size_bytes=size_bytes)
        pass_over = _Pass(
            file, layout, name=name, stem=storage.name_of(uri).removesuffix(SUFFIXES["ffcv"])
        )
        pass_over.run()
    table = pass_over.table()
    file_name = storage.name_of(uri)
    sha256 = pass_over.digest.hexdigest()
    return ShardIndex(
        ShardFile.of(table, name=file_name, size_bytes=size_bytes, sha256=sha256),
        table,
        ignored=layout.ignored,
        bad=pass_over.bad,
    )


class _Pass:
    """Reads a beton from its first byte to its last, hashing, and looks at images and texts as they
    come by."""

    def __init__(self, file: BinaryIO, layout: Layout, *, name: str, stem: str) -> None:
        self._file = file
        self._layout = layout
        self._name = name
        self._stem = stem
        self.digest = hashlib.sha256()
        self.bad: list[tuple[str, Refused]] = []
        count = len(layout.image)
        self._found: list[Probe | Refused] = [Refused(Reason.EMPTY)] * count
        self._hashes = [0] * count
        self._texts: dict[int, bytes] = {}

    def run(self) -> None:
        """Read the file."""
        places, sizes = self._layout.image["data_ptr"].tolist(), self._layout.sizes.tolist()
        spans = [(*span, row, True) for row, span in enumerate(zip(places, sizes, strict=True))]
        if self._layout.texts is not None:
            spans += [
                (int(entry["ptr"]), int(entry["size"]), row, False)
                for row, entry in enumerate(self._layout.texts)
                if 0 < entry["size"] <= _MAX_TEXT_BYTES
            ]
        self._file.seek(0)
        at = 0
        for start, size, row, is_image in sorted(spans):
            if start < at:
                raise DataError(
                    f"{self._name}: samples lie on top of each other at byte {start}. Write it "
                    "again."
                )
            self._skip(start - at)
            data = self._read(size)
            at = start + size
            if is_image:
                self._hashes[row] = xxhash.xxh3_64_intdigest(data)
                self._found[row] = self._look(row, data)
            else:
                self._texts[row] = data
        while part := self._file.read(_CHUNK_BYTES):
            self.digest.update(part)

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise DataError(
                f"{self._name}: the beton ends inside a sample. Copy it again from its source."
            )
        self.digest.update(data)
        return data

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._read(min(size, _CHUNK_BYTES)))

    def _look(self, row: int, data: bytes) -> Probe | Refused:
        entry = self._layout.image[row]
        width, height = int(entry["width"]), int(entry["height"])
        if entry["mode"] == beton.MODE_RAW:
            if len(data) != width * height * 3:
                return Refused(Reason.TRUNCATED)
            return Probe("raw", width, height, "RGB")
        found = probe(data)
        if isinstance(found, Probe) and (found.width, found.height) != (width, height):
            detail = f"{found.width} x {found.height} pixels, the beton says {width} x {height}"
            return Refused(Reason.SIZE_DIFFERS, detail)
        return found

    def table(self) -> ShardTable:
        """Return the rows, in the order of the beton's own table."""
        rows = TableBuilder()
        keys = self._keys()
        layout = self._layout
        for row, (key, found) in enumerate(zip(keys, self._found, strict=True)):
            if isinstance(found, Refused):
                self.bad.append((key, found))
                found = Probe("bad", 0, 0, "")
            label = int(layout.labels[row])
            rows.add(
                key,
                offset=int(layout.image["data_ptr"][row]),
                size=int(layout.sizes[row]),
                label=label if 0 <= label < 2**31 else NO_LABEL,
                width=found.width,
                height=found.height,
                image_format=found.format,
                mode=found.mode,
                xxh3=self._hashes[row],
            )
        return rows.build()

    def _keys(self) -> list[str]:
        """Return the stored keys where every sample has one of its own, or the file's name and the
        number."""
        keys = [
            _key_of(self._texts.get(row, b""), self._layout.texts_are_json)
            for row in range(len(self._found))
        ]
        if all(keys) and len(set(keys)) == len(keys):
            return keys
        stem = "_".join(self._stem.replace(".", "_").split())
        return [f"{stem}/{row:08d}" for row in range(len(keys))]


def _key_of(text: bytes, is_json: bool) -> str:
    if is_json:
        found = (beton.parse_json(text) or {}).get("key")
        return found if isinstance(found, str) else ""
    try:
        return text.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return ""


def read_metas(uri: str) -> list[dict[str, object] | None]:
    """Return what a beton knows of each image beside its key: `about`, or all of another writer's
    JSON; or nothing.

    Raises:
        DataError: It is no beton, or cut.
    """
    with storage.open_read(uri) as file:
        layout = read_layout(file, name=storage.redact(uri), size_bytes=storage.size_of(uri))
        if layout.texts is None or not layout.texts_are_json:
            return [None] * len(layout.image)
        metas = []
        for entry in layout.texts:
            file.seek(int(entry["ptr"]))
            found = beton.parse_json(file.read(min(int(entry["size"]), _MAX_TEXT_BYTES)))
            about = found.get("about") if found is not None and "key" in found else found
            metas.append(about if isinstance(about, dict) else None)
        return metas
