"""Writes `.beton` files that FFCV's own Loader reads, without FFCV: given bytes are stored as they
are.

FFCV's DatasetWriter encodes images again, waits for ever for a worker that has died, and starts
processes. This writer lays the same bytes out as that one does with one worker;
tests/integration/test_ffcv_interop.py holds the two together.
"""

from __future__ import annotations

import hashlib
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats import beton
from pipeline.formats.records import ShardFile, ShardIndex
from pipeline.formats.table import NO_LABEL, ShardTable, TableBuilder
from pipeline.images.header import Probe
from pipeline.storage.retry import explain
from pipeline.storage.unfinished import UnfinishedFile

_CHUNK_BYTES = 2**20
Places = list[tuple[int, int]]
"""First bytes of each sample's image and of its text."""


def storable(found: Probe) -> bool:
    """Tell whether FFCV's readers can decode an image of this kind: a JPEG in RGB or grey, or raw
    RGB."""
    longer_side = max(found.width, found.height)
    if longer_side > beton.MAX_SIDE:
        return False
    # FFCV hands every JPEG to libjpeg-turbo for RGB, which refuses CMYK.
    if found.format == "jpeg":
        return found.mode in ("RGB", "L")
    return found.format == "raw"


def _check_pixels(key: str, image: bytes, found: Probe) -> None:
    """Refuse raw pixels of another size: readers would take what lies behind them for pixels."""
    expected_bytes = found.width * found.height * 3
    if len(image) != expected_bytes:
        raise ValueError(
            f"{key}: {len(image)} bytes are not {found.height} x {found.width} x 3 pixels"
        )


class BetonWriter:
    """Write one shard: samples go to a temporary file, and are laid out in pages when all are
    known.

    A page must hold a whole sample, and pages begin behind a table that has a row a sample: neither
    is known before the last. The bytes depend on what is added and its order alone. Use it as a
    context manager; leaving it by an exception removes the temporary files.

    Fields: `image` (RGBImageField), `label` (IntField, -1 for none), `meta` (JSONField: `key`, and
        `about` if given).

    Args:
        uri: Where the finished shard goes.
        page_bytes: Smallest page, a power of two of 2 MiB or more; larger samples make it larger.
    """

    def __init__(self, uri: str, *, page_bytes: int = beton.DEFAULT_PAGE_BYTES) -> None:
        self._uri = uri
        self._page_bytes = page_bytes
        # Images as they come; never committed, only read back when all places are known.
        self._spool = UnfinishedFile(uri)
        self._file = UnfinishedFile(uri)
        # What the image is, its size in bytes, label and xxh3_64: the pixels stay on disk.
        self._images: list[tuple[Probe, int, int, int]] = []
        self._metas: list[bytes] = []
        self._labels: list[int] = []
        # A dict, because a set forgets the order in which keys came.
        self._keys: dict[str, None] = {}

    def __enter__(self) -> BetonWriter:
        self._spool.__enter__()
        try:
            self._file.__enter__()
        # `with` does not call `__exit__` if `__enter__` raises: the spool would stay on disk.
        except BaseException:
            self._spool.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spool.__exit__(kind, error, trace)
        self._file.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._images)

    def add(
        self,
        key: str,
        image: bytes,
        found: Probe,
        *,
        label: int = NO_LABEL,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Append one sample.

        Args:
            key: Unique in the dataset.
            image: A JPEG file, stored as it is, or the pixels of a `raw` image: height x width x 3
                bytes.
            found: What the image is.
            label: Class number, -1 for none.
            metadata: Stored as `about` in the field `meta`.

        Raises:
            DataError: The key is taken, or FFCV cannot read such an image.
            InfrastructureError: The disk is full or not writable.
        """
        # Everything is checked before the first byte is written: a refused sample leaves no trace.
        if not storable(found):
            raise DataError(
                f"{key}: a {found.mode} {found.format} of {found.width} x {found.height} pixels "
                "cannot be stored in a beton, which holds JPEG or raw pixels; re-encode it "
                "(--resize, or --write-mode raw)."
            )
        if found.format == "raw":
            _check_pixels(key, image, found)
        if key in self._keys:
            raise DataError(
                f"{key!r} is already in {storage.name_of(self._uri)}: keys must be unique."
            )
        stored_meta: dict[str, Any] = {"key": key}
        if metadata is not None:
            # Sorted, so that the bytes do not depend on the order in which they came.
            in_order = sorted(metadata.items())
            stored_meta["about"] = dict(in_order)
        meta = beton.json_bytes(stored_meta)
        # A sample cannot cross pages, and the header has 32 bits for the size of one.
        sample_bytes = len(image) + len(meta)
        if sample_bytes > beton.MAX_PAGE_BYTES:
            raise DataError(
                f"{key}: {len(image)} bytes do not fit in a beton's page of at most 2 GiB; use "
                "--resize."
            )
        digest = xxhash.xxh3_64_intdigest(image)
        self._spool.write(image)
        self._keys[key] = None
        stored = (found, len(image), label, digest)
        self._images.append(stored)
        self._metas.append(meta)

    def close(self) -> ShardIndex:
        """Lay the samples out and put the file in place.

        Raises:
            InfrastructureError: The disk is full or not writable.
        """
        needed = 0
        samples = zip(self._images, self._metas, strict=True)
        for (_, size, _, _), meta in samples:
            sample_bytes = size + len(meta)
            needed = max(needed, sample_bytes)
        # FFCV finds a page by shifting, so that its size must stay a power of two.
        while self._page_bytes < needed:
            self._page_bytes *= 2
        head, places, end = self._lay_out()
        try:
            sha256, size_bytes = self._write(head, places, end)
        except OSError as error:
            raise explain("write", self._uri, error) from error
        self._file.commit()
        table = self._table(places)
        name = storage.name_of(self._uri)
        file = ShardFile.of(table, name=name, size_bytes=size_bytes, sha256=sha256)
        return ShardIndex(file, table)

    def _table(self, places: Places) -> ShardTable:
        """Return the rows that a later pass over the file would find."""
        rows = TableBuilder()
        samples = zip(self._keys, self._images, places, strict=True)
        for key, (found, size, label, digest), (offset, _) in samples:
            rows.add(
                key,
                offset=offset,
                size=size,
                label=label,
                width=found.width,
                height=found.height,
                image_format=found.format,
                mode=found.mode,
                xxh3=digest,
            )
        return rows.build()

    def _lay_out(self) -> tuple[bytes, Places, int]:
        """Return (all that stands before the pages, where each sample's image and meta go, where
        the pages end)."""
        type_ids = [type_id for _, type_id in beton.OUR_FIELDS]
        row = beton.row_dtype(type_ids)
        fields = beton.describe_fields(beton.OUR_FIELDS)
        # Zeros, not `empty`: the bytes that align a row's fields go into the file and its sha256.
        samples = np.zeros(len(self._images), row)
        # The names that numpy gave, by number: FFCV's own names are in the descriptions.
        image_name, label_name, meta_name = row.names or ()

        # Pages begin at multiples of their size, because FFCV tells a page from an address.
        tables_bytes = beton.HEADER.itemsize + fields.nbytes + samples.nbytes
        at = beton.align(tables_bytes, self._page_bytes)
        left = self._page_bytes
        places = []
        rows = zip(samples, self._images, self._metas, strict=True)
        for sample, (found, size, label, _), meta in rows:
            # Image and text share a page, which FFCV's page cache then reads once.
            sample_bytes = size + len(meta)
            if sample_bytes > left:
                at += left
                left = self._page_bytes
            meta_at = at + size
            places.append((at, meta_at))
            mode = beton.MODE_JPEG
            if found.format == "raw":
                mode = beton.MODE_RAW
            sample[image_name] = (mode, found.width, found.height, at)
            sample[label_name] = label
            sample[meta_name] = (meta_at, len(meta))
            at += sample_bytes
            left -= sample_bytes

        # The last page is whole too, because FFCV's page cache reads whole pages only.
        end = at + left
        header = np.zeros(1, beton.HEADER)
        num_fields = len(fields)
        num_samples = len(samples)
        header[0] = (beton.VERSION, num_fields, self._page_bytes, num_samples, end)
        head = header.tobytes() + fields.tobytes() + samples.tobytes()
        return head, places, end

    def _write(self, head: bytes, places: Places, end: int) -> tuple[str, int]:
        """Write everything from first to last byte; return sha256 and size."""
        spool = self._spool.file
        file = self._file.file
        spool.seek(0)
        # Hashed while written: reading the shard again would double its I/O.
        digest = hashlib.sha256()
        at = 0

        def put(data: bytes) -> None:
            nonlocal at
            file.write(data)
            digest.update(data)
            at += len(data)

        def fill(until: int) -> None:
            # In pieces: a page may have 2 GiB.
            while at < until:
                missing = until - at
                put(bytes(min(_CHUNK_BYTES, missing)))

        put(head)
        # Two runs a sample, image and text, in the order of the file.
        num_allocations = 2 * len(places)
        allocations = np.zeros(num_allocations, beton.ALLOCATION)
        samples = zip(places, self._images, self._metas, strict=True)
        for i, ((offset, meta_offset), (_, size, _, _), meta) in enumerate(samples):
            # Samples lie in the order in which they were spooled: the spool is read straight on.
            fill(offset)
            put(spool.read(size))
            put(meta)
            allocations[2 * i] = (i, offset, size)
            of_text = 2 * i + 1
            allocations[of_text] = (i, meta_offset, len(meta))
        fill(end)
        put(allocations.tobytes())
        return digest.hexdigest(), at
