"""What a dataset is, and the place of each of its samples.

`dataset.json` names the shards; `manifest.parquet` has one row group a shard and one row a sample.
Beyond `SHARDS_PER_FILE` shards the manifest is cut into `manifest-00000.parquet`, ...: a Parquet
footer grows with its row groups, and a reader needs the whole footer before the first row.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset.info import DatasetInfo, ManifestFile
from pipeline.errors import DataError
from pipeline.formats.table import SCHEMA, Int32, Int64, ShardTable, key_list

_NAMED = 10
"""Changed shards that an error names at most."""
_CACHED_ROWS = 4_000_000
"""Rows of shard tables kept in memory, 46 bytes each."""
_OPEN_FILES = 32
"""Manifest files kept open, 2 MB of parsed footer each; opening one again takes 3 ms on a local
disk."""
_COLUMNS = [name for name in SCHEMA.names if name != "key"]


@dataclass(frozen=True)
class Rows:
    """What the manifest says of B samples, in the order asked for.

    Args:
        shards_B: Shard of each sample.
        indices_B: Row of each sample in its shard.
        offsets_B: First byte of the image in the shard file.
        sizes_B: Bytes of the image.
        labels_B: Class numbers, -1 if there is none.
        widths_B: Pixels, before any EXIF rotation; 0 if the header cannot be read.
        heights_B: Likewise.
        hashes_B: xxh3_64 of the image's bytes.
        formats_B: Indices into `FORMATS`.
        modes_B: Indices into `MODES`.
    """

    shards_B: Int64
    indices_B: Int64
    offsets_B: Int64
    sizes_B: Int64
    labels_B: Int32
    widths_B: Int32
    heights_B: Int32
    hashes_B: npt.NDArray[np.uint64]
    formats_B: npt.NDArray[np.uint8]
    modes_B: npt.NDArray[np.uint8]


class _OpenFile:
    """One manifest file, open. Its lock is needed because a Parquet reader serves one thread at a
    time."""

    def __init__(self, uri: str, expected: ManifestFile) -> None:
        self.uri = uri
        self.lock = threading.Lock()
        # Before anything is parsed: the footer is the file's last part, so that a cut file looks
        # like any damage to Arrow.
        size_bytes = storage.size_of(uri)
        if size_bytes != expected.size_bytes:
            raise DataError(
                f"manifest: {storage.redact(uri)} has {size_bytes} bytes, dataset.json says "
                f"{expected.size_bytes}. It was cut or replaced: write it again with "
                "pipeline.verify --write-manifest."
            )
        if storage.is_local(uri):
            path = storage.local_path(uri)
            source: Any = pa.OSFile(str(path), "rb")
        else:
            # Arrow's own object stores know neither our retries nor our settings.
            opened = storage.open_read(uri, buffer_bytes=2**18)
            source = pa.PythonFile(cast(io.IOBase, opened), mode="r")
        with _damage_as_data_error(uri):
            self.parquet = pq.ParquetFile(
                source,
                # A handful of distinct names: decoded to strings they take most of the time.
                read_dictionary=["format", "mode"],
                page_checksum_verification=True,
                pre_buffer=False,
            )
        if self.parquet.num_row_groups != expected.num_shards:
            raise DataError(
                f"manifest: {storage.redact(uri)} holds {self.parquet.num_row_groups} shards, "
                f"dataset.json says {expected.num_shards}. Write it again with pipeline.verify "
                "--write-manifest."
            )

    def read(self, group: int, columns: list[str]) -> pa.Table:
        # One thread: the loader's own threads are busy beside it, and a row group is small.
        with self.lock, _damage_as_data_error(self.uri):
            return self.parquet.read_row_group(
                group, columns=columns, use_threads=False
            )


@contextmanager
def _damage_as_data_error(uri: str) -> Iterator[None]:
    """Turn Arrow's exceptions about a damaged file into a `DataError` that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"manifest: {storage.redact(uri)} is damaged ({type(error).__name__}: {error}). "
            "Write it again with pipeline.verify --write-manifest."
        ) from error


class Manifest:
    """A dataset's index: shard names, counts, and every sample's place, read as needed.

    Only the row groups of the shards in use are loaded, into a bounded cache, so that a billion
    samples open at once. Thread-safe; may be pickled to another process, where it opens its files
    anew.

    Args:
        uri: Folder of the shards.
        info: Content of `dataset.json`.
        index_uri: Folder of the manifest files; the shards' own if not given.
    """

    def __init__(
        self, uri: str, info: DatasetInfo, *, index_uri: str | None = None
    ) -> None:
        self.uri = uri
        self.info = info
        self.index_uri = uri
        # Shards that cannot be written to have their manifest in another folder.
        if index_uri is not None:
            self.index_uri = index_uri
        counts = info.shards.columns["num_samples"]
        self.shard_sizes = np.array(counts, dtype=np.int64)
        # One more than there are shards: the last is the number of samples.
        ends = np.cumsum(self.shard_sizes)
        zero = np.zeros(1, np.int64)
        self.shard_starts = np.concatenate([zero, ends])
        first_shards = [file.first_shard for file in info.manifest]
        self._first_shards = np.array(first_shards, dtype=np.int64)

        # Held while the two caches change, never while a file is read.
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._cached_rows = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Locks and open files cannot be pickled, and cached rows are not worth sending.
        return _reopen, (self.uri, self.info, self.index_uri)

    def shard_name(self, s: int) -> str:
        """Return the file name of shard s."""
        names = self.info.shards.columns["name"]
        return str(names[s])

    def shard_uri(self, s: int) -> str:
        """Return where shard s is."""
        return storage.join(self.uri, self.shard_name(s))

    def shard_bytes(self, s: int) -> int:
        """Return the size of shard s's file."""
        sizes = self.info.shards.columns["size_bytes"]
        return int(sizes[s])

    def shard_sha256(self, s: int) -> str:
        """Return the sha256 of shard s's file, in hex."""
        hashes = self.info.shards.columns["sha256"]
        return str(hashes[s])

    def _file(
        self, s: int, *, use: Literal["open", "anew"] = "open"
    ) -> tuple[_OpenFile, int]:
        """Return the open file that has shard s, and the row group in it.

        Args:
            s: Shard.
            use: `anew` opens the file again: what a file keeps of a bad read would be bad for ever.
        """
        # "right" less one: the last file that begins at this shard or before it.
        behind = np.searchsorted(self._first_shards, s, side="right")
        number = int(behind) - 1
        expected = self.info.manifest[number]
        with self._lock:
            if use == "anew":
                self._files.pop(number, None)
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
        if file is None:
            # Two threads may open the same file, which wastes 3 ms; the first one's is kept.
            uri = storage.join(self.index_uri, expected.name)
            opened = _OpenFile(uri, expected)
            with self._lock:
                file = self._files.setdefault(number, opened)
                # Dropped, not closed: another thread may be reading from it.
                while len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
        return file, s - expected.first_shard

    def _read(self, s: int, columns: list[str]) -> pa.Table:
        try:
            file, group = self._file(s)
            table = file.read(group, columns)
        except DataError:
            if storage.is_local(self.index_uri):
                raise
            # A byte may have been flipped on the way: what is damaged in the store is damaged
            # again.
            file, group = self._file(s, use="anew")
            table = file.read(group, columns)
        if table.num_rows != self.shard_sizes[s]:
            raise DataError(
                f"manifest: {storage.redact(file.uri)}: {self.shard_name(s)} has {table.num_rows} "
                f"rows, dataset.json says {self.shard_sizes[s]}. Write it again with "
                "pipeline.verify --write-manifest."
            )
        return table

    def shard_table(self, s: int) -> ShardTable:
        """Return the rows of shard s; the keys are read when asked for.

        Raises:
            DataError: The manifest is damaged or does not match `dataset.json`.
        """
        if not 0 <= s < self.info.num_shards:
            raise DataError(
                f"manifest: there is no shard {s}; the dataset has {self.info.num_shards}."
            )
        with self._lock:
            known = self._tables.get(s)
            if known is not None:
                self._tables.move_to_end(s)
                return known
        columns = self._read(s, _COLUMNS)
        read_keys = partial(self._read_keys, s)
        table = ShardTable.from_arrow(columns, keys=read_keys)
        with self._lock:
            # Another thread may have read the same rows meanwhile; they count once.
            if s not in self._tables:
                self._tables[s] = table
                self._cached_rows += len(table)
            # A single table above the limit stays, or every look-up would read it again.
            while self._cached_rows > _CACHED_ROWS and len(self._tables) > 1:
                _, oldest = self._tables.popitem(last=False)
                self._cached_rows -= len(oldest)
        return table

    def _read_keys(self, s: int) -> list[str]:
        table = self._read(s, ["key"])
        return key_list(table)

    def locate(self, sample_ids_B: Int64) -> tuple[Int64, Int64]:
        """Return (shards_B, indices_B) of samples without reading the manifest.

        Raises:
            DataError: A sample id is outside the dataset.
        """
        ids_B = np.asarray(sample_ids_B, dtype=np.int64)
        # numpy would take a negative id for one that counts from the end.
        if ids_B.size and not (
            ids_B.min() >= 0 and ids_B.max() < self.info.num_samples
        ):
            raise DataError(
                f"manifest: sample ids {ids_B.min()} to {ids_B.max()} were asked for; "
                f"the dataset has samples 0 to {self.info.num_samples - 1}."
            )
        # An empty shard begins where the next one does; "right" passes over it.
        shards_B = np.searchsorted(self.shard_starts, ids_B, side="right") - 1
        indices_B = ids_B - self.shard_starts[shards_B]
        return shards_B.astype(np.int64), indices_B

    def lookup(self, sample_ids_B: Int64) -> Rows:
        """Return what the manifest says of some samples, in the order given.

        Raises:
            DataError: A sample id is outside the dataset, or the manifest is damaged.
        """
        shards_B, indices_B = self.locate(sample_ids_B)
        names = (
            "offsets",
            "sizes",
            "labels",
            "widths",
            "heights",
            "hashes",
            "formats",
            "modes",
        )
        dtypes = (
            "int64",
            "int64",
            "int32",
            "int32",
            "int32",
            "uint64",
            "uint8",
            "uint8",
        )
        columns = {}
        for name, dtype in zip(names, dtypes, strict=True):
            column_dtype = np.dtype(dtype)
            columns[name] = np.empty(len(shards_B), dtype=column_dtype)

        # Shard by shard: a batch of scattered samples must not ask for a table once per sample.
        order_B = np.argsort(shards_B, kind="stable")
        unique, starts = np.unique(shards_B[order_B], return_index=True)
        if len(unique):
            groups = np.split(order_B, starts[1:])
        else:
            groups = []
        for s, places in zip(unique.tolist(), groups, strict=True):
            table = self.shard_table(s)
            rows = indices_B[places]
            for name, column in columns.items():
                values = getattr(table, name)
                column[places] = values[rows]
        by_field = {}
        for name, column in columns.items():
            by_field[f"{name}_B"] = column
        return Rows(shards_B, indices_B, **by_field)

    def keys(self, sample_ids_B: Int64) -> list[str]:
        """Return the keys of some samples, in the order given; for reports, not for the hot
        path."""
        shards_B, indices_B = self.locate(sample_ids_B)
        keys = []
        pairs = zip(shards_B.tolist(), indices_B.tolist(), strict=True)
        for s, i in pairs:
            table = self.shard_table(s)
            keys.append(table.keys[i])
        return keys


def _reopen(uri: str, info: DatasetInfo, index_uri: str) -> Manifest:
    return Manifest(uri, info, index_uri=index_uri)


def diff(a: DatasetInfo, b: DatasetInfo) -> list[str]:
    """Return the names of shards whose samples differ, or that only one of the two has, in
    order."""
    first = {shard.name: shard.content_hash for shard in a.shards}
    second = {shard.name: shard.content_hash for shard in b.shards}
    # The first one's order, then what only the second has; a dict's keys keep both.
    names = dict.fromkeys([*first, *second])
    changed = []
    for name in names:
        if first.get(name) != second.get(name):
            changed.append(name)
    return changed


def describe_change(
    dataset: Manifest, fingerprint: str, trained_on: DatasetInfo | None
) -> str:
    """Say that a dataset is not the one a run was started on, and in which shards.

    Args:
        dataset: what is there now.
        fingerprint: of what the run was started on.
        trained_on: its description, if it was kept.
    """
    what = (
        f"dataset: {storage.redact(dataset.uri)} has fingerprint {dataset.info.fingerprint[:16]}, "
        f"the run was started on {fingerprint[:16]}: its samples changed"
    )
    # A description of another dataset says little about this change.
    if trained_on and trained_on.fingerprint == fingerprint:
        changed = diff(trained_on, dataset.info)
        if changed:
            named = ", ".join(changed[:_NAMED])
            what += f" in {len(changed)} of {dataset.info.num_shards} shards: {named}"
            if len(changed) > _NAMED:
                what += f" and {len(changed) - _NAMED} more"
        else:
            what += " places: the same shards are in another order"
    return (
        f"{what}. Restore the old shards, start a new run, or accept them with "
        "data.on_change next-epoch"
    )
