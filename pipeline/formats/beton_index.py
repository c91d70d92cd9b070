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
from pipeline.formats.table import NO_LABEL, Int64, ShardTable, TableBuilder
from pipeline.images.header import Probe, probe
from pipeline.images.refused import Reason, Refused

_CHUNK_BYTES = 2**20
# Limits on what a damaged or hostile header may make this program allocate. Real keys take less
# than a kilobyte.
_MAX_SAMPLES = 2**32
_MAX_TEXT_BYTES = 2**20


@dataclass
class Layout:
    """What the tables of a beton say.

    Args:
        image: Mode, width, height and first byte of each sample's image.
        sizes: Bytes of each image.
        labels: Class numbers.
        texts: First byte and size of the JSON or bytes field that may hold the keys; None if the
            beton has no such field.
        texts_are_json: Whether that field is JSON.
        ignored: Fields that are not read, by reason.
    """

    image: npt.NDArray
    sizes: Int64
    labels: Int64
    texts: npt.NDArray | None
    texts_are_json: bool
    ignored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tables:
    """A beton's tables as they stand in the file.

    Args:
        fields: Names and kinds of the fields of every sample.
        rows: One row per sample, one column per field. Columns go by number, because two fields may
            have the same name.
        allocations: Runs of bytes that belong to samples.
    """

    fields: list[beton.Field]
    rows: npt.NDArray
    allocations: npt.NDArray

    def column(self, number: int) -> npt.NDArray:
        """Return one field of all samples."""
        names = self.rows.dtype.names or ()
        return self.rows[names[number]]


def read_layout(file: BinaryIO, *, name: str, size_bytes: int) -> Layout:
    """Read a beton's tables.

    Args:
        file: The beton, seekable.
        name: What to call it in errors.
        size_bytes: Its size.

    Raises:
        DataError: It is not a beton, of another version, cut, or has no image field.
    """
    tables = _read_tables(file, name=name, size_bytes=size_bytes)
    fields = tables.fields
    count = len(tables.rows)

    # A beton may have several images per sample; the first one is the sample's, as in a tar.
    image_numbers = _numbers_of(fields, (beton.IMAGE,))
    if not image_numbers:
        names = [entry.name for entry in fields]
        raise DataError(f"{name}: no image field among {names}.")
    image_number = image_numbers[0]
    image = tables.column(image_number)
    starts = image["data_ptr"]
    sizes = _allocated_bytes(starts, tables.allocations, name)
    used = {image_number}

    # A beton without a label is a dataset for pre-training, not an error.
    labels = np.full(count, NO_LABEL, np.int64)
    label_number = _choose(fields, (beton.INT,), "label")
    if label_number is not None:
        stored_labels = tables.column(label_number)
        labels = stored_labels.astype(np.int64)
        used.add(label_number)

    # A JSON field of another writer may be anything; what it says is looked at sample by sample.
    texts = None
    texts_are_json = False
    text_number = _choose(fields, (beton.JSON, beton.BYTES), "meta", "key")
    if text_number is not None:
        texts = tables.column(text_number)
        text_field = fields[text_number]
        texts_are_json = text_field.type_id == beton.JSON
        used.add(text_number)
        _check_texts(texts, tables.allocations, name)

    # Reported by name, so that nobody takes a second image or a mask for read.
    unused = []
    for i, entry in enumerate(fields):
        if i not in used:
            unused.append(entry)
    by_name = Counter(f"field {entry.name!r}" for entry in unused)
    ignored = dict(by_name)
    return Layout(image, sizes, labels, texts, texts_are_json, ignored)


def _read_tables(file: BinaryIO, *, name: str, size_bytes: int) -> _Tables:
    head_bytes = _read_exactly(file, 0, beton.HEADER.itemsize, name)
    (head,) = head_bytes.view(beton.HEADER)
    if head["version"] != beton.VERSION:
        raise DataError(
            f"{name}: not a beton of version {beton.VERSION} (its version is {head['version']}). "
            "Write it again."
        )

    # Every number is checked before memory is taken for what it counts: a damaged header may ask
    # for terabytes.
    count = int(head["num_samples"])
    table_at = int(head["alloc_table_ptr"])
    # The allocations are the file's last part and have no count of their own: they go to its end.
    # FFCV writes their place when it is done, so that 0 marks a file that was never finished.
    table_bytes = size_bytes - table_at
    is_inside = 0 < table_at <= size_bytes
    is_even = table_bytes % beton.ALLOCATION.itemsize == 0
    is_whole = is_inside and is_even
    is_counted = 0 < count < _MAX_SAMPLES
    if not is_whole or not is_counted:
        raise DataError(
            f"{name}: the beton is empty, cut or was never finished: {count} samples, allocations "
            f"at byte {table_at} of {size_bytes}. Copy it again from its source, or write it again."
        )

    fields_at = beton.HEADER.itemsize
    num_fields = int(head["num_fields"])
    fields_bytes = num_fields * beton.FIELD.itemsize
    description_bytes = _read_exactly(file, fields_at, fields_bytes, name)
    descriptions = description_bytes.view(beton.FIELD)
    fields = beton.fields_of(descriptions)
    unknown = []
    for entry in fields:
        if entry.type_id not in beton.FIELD_ROWS:
            unknown.append(entry.name)
    if unknown:
        # The width of its column is unknown, and so is where every later column begins.
        raise DataError(
            f"{name}: field {unknown[0]!r} is of a custom kind, so the samples' rows cannot be "
            "read."
        )

    type_ids = [entry.type_id for entry in fields]
    row = beton.row_dtype(type_ids)
    rows_at = fields_at + fields_bytes
    rows_bytes = count * row.itemsize
    row_bytes = _read_exactly(file, rows_at, rows_bytes, name)
    rows = row_bytes.view(row)
    allocation_bytes = _read_exactly(file, table_at, table_bytes, name)
    allocations = allocation_bytes.view(beton.ALLOCATION)
    return _Tables(fields, rows, allocations)


def _numbers_of(fields: list[beton.Field], kinds: tuple[int, ...]) -> list[int]:
    """Return the numbers of the fields of some kinds."""
    numbers = []
    for number, entry in enumerate(fields):
        if entry.type_id in kinds:
            numbers.append(number)
    return numbers


def _choose(
    fields: list[beton.Field], kinds: tuple[int, ...], *names: str
) -> int | None:
    """Return the field of one of these kinds that has one of these names, or the only one of these
    kinds."""
    of_kind = _numbers_of(fields, kinds)
    named = []
    for i in of_kind:
        if fields[i].name in names:
            named.append(i)
    if named:
        return named[0]
    # Among several of the kind without a known name a choice would be a guess.
    if len(of_kind) == 1:
        return of_kind[0]
    return None


def _read_exactly(
    file: BinaryIO, start: int, size: int, name: str
) -> npt.NDArray[np.uint8]:
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise DataError(
            f"{name}: the beton ends at byte {start + len(data)}, inside its tables. Copy it again "
            "from its source."
        )
    return np.frombuffer(data, np.uint8)


def _allocated_bytes(starts: npt.NDArray, allocations: npt.NDArray, name: str) -> Int64:
    """Return the size of the allocation that begins at each of these bytes."""
    # FFCV's workers write pages out of order: the table is not sorted by itself.
    order = np.argsort(allocations["ptr"], kind="stable")
    known_starts = allocations["ptr"][order]
    known_sizes = allocations["size"][order]
    known_sizes = known_sizes.astype(np.int64)
    if not len(starts):
        return np.empty(0, np.int64)

    # Past the last allocation `searchsorted` gives its length; the comparison then tells.
    last = max(len(known_starts) - 1, 0)
    nearest = np.searchsorted(known_starts, starts)
    nearest = nearest.clip(max=last)
    if not len(known_starts) or (known_starts[nearest] != starts).any():
        raise DataError(
            f"{name}: a sample lies where nothing was allocated; the beton was cut or damaged. "
            "Copy it again from its source, or write it again."
        )
    return known_sizes[nearest]


def _check_texts(texts: npt.NDArray, allocations: npt.NDArray, name: str) -> None:
    # An image row has no size of its own; a text row has one, which must agree with its allocation.
    # An empty text has no allocation at all, so that its `ptr` says little.
    has_text = texts["size"] > 0
    written = texts[has_text]
    allocated = _allocated_bytes(written["ptr"], allocations, name)
    if (allocated != written["size"]).any():
        raise DataError(
            f"{name}: the beton's tables disagree about a sample's texts. Write it again."
        )


def index_shard(uri: str) -> ShardIndex:
    """Read a beton once, from end to end, and return where its samples lie and their hashes.

    Raises:
        DataError: It is not a beton, cut or damaged.
    """
    # For messages; a URI may carry a secret.
    name = storage.redact(uri)
    file_name = storage.name_of(uri)
    stem = file_name.removesuffix(SUFFIXES["ffcv"])
    size_bytes = storage.size_of(uri)
    with storage.open_read(uri) as file:
        layout = read_layout(file, name=name, size_bytes=size_bytes)
        pass_over = _Pass(file, layout, name=name, stem=stem)
        pass_over.run()
    # The table names bad images on the way, so that it is built before they are asked for.
    table = pass_over.table()
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
        # By row, not in the order of the file: the two may differ.
        count = len(layout.image)
        self._probes: list[Probe | Refused] = [Refused(Reason.EMPTY)] * count
        self._hashes = [0] * count
        self._texts: dict[int, bytes] = {}

    def run(self) -> None:
        """Read the file."""
        self._file.seek(0)
        at = 0
        # By first byte: the file is read once, from front to back, whatever the samples' order.
        spans = sorted(self._spans())
        for start, size, row, is_image in spans:
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
                self._probes[row] = self._look(row, data)
            else:
                self._texts[row] = data
        # What follows the last sample counts for the sha256 too.
        while chunk := self._file.read(_CHUNK_BYTES):
            self.digest.update(chunk)

    def _spans(self) -> list[tuple[int, int, int, bool]]:
        """Return first byte, size, row and whether it is an image, of all that is looked at."""
        starts = self._layout.image["data_ptr"].tolist()
        sizes = self._layout.sizes.tolist()
        rows = range(len(starts))
        spans = [(starts[row], sizes[row], row, True) for row in rows]
        texts = self._layout.texts
        if texts is None:
            return spans
        for row, (start, size) in enumerate(texts.tolist()):
            # Longer texts are no keys, and need not be in memory; they are hashed all the same.
            if 0 < size <= _MAX_TEXT_BYTES:
                spans.append((start, size, row, False))
        return spans

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise DataError(
                f"{self._name}: the beton ends inside a sample. Copy it again from its source."
            )
        self.digest.update(data)
        return data

    def _skip(self, size: int) -> None:
        # Read, not sought: these bytes are a part of the file's sha256.
        while size:
            chunk = self._read(min(size, _CHUNK_BYTES))
            size -= len(chunk)

    def _look(self, row: int, data: bytes) -> Probe | Refused:
        entry = self._layout.image[row]
        width = int(entry["width"])
        height = int(entry["height"])
        # Raw pixels have no header to look at: their number is all that can be checked.
        if entry["mode"] == beton.MODE_RAW:
            expected_bytes = width * height * 3
            if len(data) != expected_bytes:
                return Refused(Reason.TRUNCATED)
            return Probe("raw", width, height, "RGB")
        probed = probe(data)
        if isinstance(probed, Refused):
            return probed
        # Boxes are drawn from the table's size; cut from an image of another, they lie elsewhere.
        declared = (width, height)
        if (probed.width, probed.height) != declared:
            said = f"the beton says {width} x {height}"
            detail = f"{probed.width} x {probed.height} pixels, {said}"
            return Refused(Reason.SIZE_DIFFERS, detail)
        return probed

    def table(self) -> ShardTable:
        """Return the rows, in the order of the beton's own table."""
        rows = TableBuilder()
        keys = self._keys()
        starts = self._layout.image["data_ptr"].tolist()
        sizes = self._layout.sizes.tolist()
        labels = self._layout.labels.tolist()
        samples = zip(keys, self._probes, strict=True)
        for row, (key, probed) in enumerate(samples):
            if isinstance(probed, Refused):
                self.bad.append((key, probed))
                # The sample keeps its row, so that ids and order do not depend on what is broken.
                probed = Probe("bad", 0, 0, "")
            # The manifest holds 32 bits; other writers use any integer for "no label".
            if 0 <= labels[row] < 2**31:
                label = labels[row]
            else:
                label = NO_LABEL
            rows.add(
                key,
                offset=starts[row],
                size=sizes[row],
                label=label,
                width=probed.width,
                height=probed.height,
                image_format=probed.format,
                mode=probed.mode,
                xxh3=self._hashes[row],
            )
        return rows.build()

    def _keys(self) -> list[str]:
        """Return the stored keys if every sample has one of its own, or else the file's name and
        the sample's number."""
        is_json = self._layout.texts_are_json
        rows = range(len(self._probes))
        keys = []
        for row in rows:
            text = self._texts.get(row, b"")
            keys.append(_key_of(text, is_json))
        # All or none: a mixture could repeat a key that another shard has.
        num_distinct = len(set(keys))
        are_distinct = num_distinct == len(keys)
        if all(keys) and are_distinct:
            return keys
        # A key may hold neither dots nor blanks, so that the sample can go into a tar as well.
        without_dots = self._stem.replace(".", "_")
        words = without_dots.split()
        stem = "_".join(words)
        numbered = []
        for row in rows:
            numbered.append(f"{stem}/{row:08d}")
        return numbered


def _key_of(text: bytes, is_json: bool) -> str:
    """Return the key that a text holds, or an empty one."""
    if is_json:
        stored = beton.parse_json(text) or {}
        key = stored.get("key")
        if isinstance(key, str):
            return key
        return ""
    # A bytes field may hold anything, a mask for example: then it is not a key.
    try:
        return text.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return ""


def read_metas(uri: str) -> list[dict[str, object] | None]:
    """Return what a beton knows of each image beside its key: `about`, or all of another writer's
    JSON, or None.

    Raises:
        DataError: It is not a beton, or cut.
    """
    name = storage.redact(uri)
    size_bytes = storage.size_of(uri)
    with storage.open_read(uri) as file:
        layout = read_layout(file, name=name, size_bytes=size_bytes)
        if layout.texts is None or not layout.texts_are_json:
            return [None] * len(layout.image)
        metas: list[dict[str, object] | None] = []
        for entry in layout.texts:
            file.seek(int(entry["ptr"]))
            size = min(int(entry["size"]), _MAX_TEXT_BYTES)
            text = file.read(size)
            stored = beton.parse_json(text)
            # Only our own writer has both names; another writer's JSON is kept whole.
            is_ours = stored is not None and "key" in stored
            about: object = stored
            if stored is not None and is_ours:
                about = stored.get("about")
            if isinstance(about, dict):
                metas.append(about)
            else:
                metas.append(None)
        return metas
