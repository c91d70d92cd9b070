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
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset.info import DatasetInfo, ManifestFile
from pipeline.errors import DataError
from pipeline.formats.table import SCHEMA, ShardTable, key_list

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

    shards_B: npt.NDArray[np.int64]
    indices_B: npt.NDArray[np.int64]
    offsets_B: npt.NDArray[np.int64]
    sizes_B: npt.NDArray[np.int64]
    labels_B: npt.NDArray[np.int32]
    widths_B: npt.NDArray[np.int32]
    heights_B: npt.NDArray[np.int32]
    hashes_B: npt.NDArray[np.uint64]
    formats_B: npt.NDArray[np.uint8]
    modes_B: npt.NDArray[np.uint8]


class _OpenFile:
    """One manifest file, open. Its lock is needed because a Parquet reader serves one thread at a
    time."""

    def __init__(self, uri: str, expected: ManifestFile) -> None:
        self.uri = uri
        self.lock = threading.Lock()
        size_bytes = storage.size_of(uri)
        if size_bytes != expected.size_bytes:
            raise DataError(
                f"manifest: {storage.redact(uri)} has {size_bytes} bytes, dataset.json says "
                f"{expected.size_bytes}. "
                "It was cut or replaced: write it again with pipeline.verify --write-manifest."
            )
        if storage.is_local(uri):
            source: Any = pa.OSFile(str(storage.local_path(uri)), "rb")
        else:
            source = pa.PythonFile(
                cast(io.IOBase, storage.open_read(uri, buffer_bytes=2**18)), mode="r"
            )
        with _damage_as_data_error(uri):
            self.parquet = pq.ParquetFile(
                source,
                read_dictionary=["format", "mode"],
                page_checksum_verification=True,
                pre_buffer=False,
            )
        if self.parquet.num_row_groups != expected.num_shards:
            raise DataError(
                f"manifest: {storage.redact(uri)} holds {self.parquet.num_row_groups} shards, "
                "dataset.json says "
                f"{expected.num_shards}. Write it again with pipeline.verify --write-manifest."
            )

    def read(self, group: int, columns: list[str]) -> pa.Table:
        with self.lock, _damage_as_data_error(self.uri):
            return self.parquet.read_row_group(group, columns=columns, use_threads=False)


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

    def __init__(self, uri: str, info: DatasetInfo, *, index_uri: str | None = None) -> None:
        self.uri = uri
        self.info = info
        self.index_uri = index_uri if index_uri is not None else uri
        self.shard_sizes = np.array(info.shards.columns["num_samples"], dtype=np.int64)
        self.shard_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.shard_sizes)])
        self._first_shards = np.array([file.first_shard for file in info.manifest], dtype=np.int64)
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._cached_rows = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.uri, self.info, self.index_uri)

    def shard_name(self, s: int) -> str:
        """Return the file name of shard s."""
        return str(self.info.shards.columns["name"][s])

    def shard_uri(self, s: int) -> str:
        """Return where shard s is."""
        return storage.join(self.uri, self.shard_name(s))

    def shard_bytes(self, s: int) -> int:
        """Return the size of shard s's file."""
        return int(self.info.shards.columns["size_bytes"][s])

    def shard_sha256(self, s: int) -> str:
        """Return the sha256 of shard s's file, in hex."""
        return str(self.info.shards.columns["sha256"][s])

    def _file(self, s: int, *, use: Literal["open", "anew"] = "open") -> tuple[_OpenFile, int]:
        """Return the open file that has shard s, and the row group in it.

        Args:
            s: Shard.
            use: `anew` opens the file again: what a file keeps of a bad read would be bad for ever.
        """
        number = int(np.searchsorted(self._first_shards, s, side="right")) - 1
        expected = self.info.manifest[number]
        with self._lock:
            if use == "anew":
                self._files.pop(number, None)
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
        if file is None:
            file = _OpenFile(storage.join(self.index_uri, expected.name), expected)
            with self._lock:
                file = self._files.setdefault(number, file)
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
                "rows, dataset.json "
                f"says {self.shard_sizes[s]}. Write it again with pipeline.verify --write-manifest."
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
        table = ShardTable.from_arrow(
            self._read(s, _COLUMNS), keys=lambda: key_list(self._read(s, ["key"]))
        )
        with self._lock:
            if s not in self._tables:
                self._tables[s] = table
                self._cached_rows += len(table)
            while self._cached_rows > _CACHED_ROWS and len(self._tables) > 1:
                self._cached_rows -= len(self._tables.popitem(last=False)[1])
        return table

    def locate(
        self, sample_ids_B: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (shards_B, indices_B) of samples without reading the manifest.

        Raises:
            DataError: A sample id is outside the dataset.
        """
        ids_B = np.asarray(sample_ids_B, dtype=np.int64)
        if ids_B.size and not (ids_B.min() >= 0 and ids_B.max() < self.info.num_samples):
            raise DataError(
                f"manifest: sample ids {ids_B.min()} to {ids_B.max()} were asked for; "
                f"the dataset has samples 0 to {self.info.num_samples - 1}."
            )
        shards_B = np.searchsorted(self.shard_starts, ids_B, side="right") - 1
        return shards_B.astype(np.int64), ids_B - self.shard_starts[shards_B]

    def lookup(self, sample_ids_B: npt.NDArray[np.int64]) -> Rows:
        """Return what the manifest says of some samples, in the order given.

        Raises:
            DataError: A sample id is outside the dataset, or the manifest is damaged.
        """
        shards_B, indices_B = self.locate(sample_ids_B)
        names = ("offsets", "sizes", "labels", "widths", "heights", "hashes", "formats", "modes")
        dtypes = ("int64", "int64", "int32", "int32", "int32", "uint64", "uint8", "uint8")
        columns = {
            name: np.empty(len(shards_B), dtype=np.dtype(dtype))
            for name, dtype in zip(names, dtypes, strict=True)
        }
        order_B = np.argsort(shards_B, kind="stable")
        unique, starts = np.unique(shards_B[order_B], return_index=True)
        groups = np.split(order_B, starts[1:]) if len(unique) else []
        for s, places in zip(unique.tolist(), groups, strict=True):
            table = self.shard_table(s)
            for name, column in columns.items():
                column[places] = getattr(table, name)[indices_B[places]]
        return Rows(
            shards_B, indices_B, **{f"{name}_B": column for name, column in columns.items()}
        )

    def keys(self, sample_ids_B: npt.NDArray[np.int64]) -> list[str]:
        """Return the keys of some samples, in the order given; for reports, not for the hot
        path."""
        shards_B, indices_B = self.locate(sample_ids_B)
        return [
            self.shard_table(s).keys[i]
            for s, i in zip(shards_B.tolist(), indices_B.tolist(), strict=True)
        ]


def _reopen(uri: str, info: DatasetInfo, index_uri: str) -> Manifest:
    return Manifest(uri, info, index_uri=index_uri)


def diff(a: DatasetInfo, b: DatasetInfo) -> list[str]:
    """Return the names of shards whose samples differ, or that only one of the two has, in
    order."""
    first = {shard.name: shard.content_hash for shard in a.shards}
    second = {shard.name: shard.content_hash for shard in b.shards}
    return [
        name
        for name in [*first, *(name for name in second if name not in first)]
        if first.get(name) != second.get(name)
    ]


def describe_change(dataset: Manifest, fingerprint: str, trained_on: DatasetInfo | None) -> str:
    """Say that a dataset is not the one a run was started on, and in which shards.

    Args:
        dataset: what is there now.
        fingerprint: of what the run was started on.
        trained_on: its description, where it was kept.
    """
    what = (
        f"dataset: {storage.redact(dataset.uri)} has fingerprint {dataset.info.fingerprint[:16]}, "
        "the run was started "
        f"on {fingerprint[:16]}: its samples changed"
    )
    changed = (
        diff(trained_on, dataset.info)
        if trained_on and trained_on.fingerprint == fingerprint
        else []
    )
    if changed:
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        named = ", ".join(changed[:_NAMED])
        what += f" in {len(changed)} of {dataset.info.num_shards} shards: {named}{more}"
    elif trained_on and trained_on.fingerprint == fingerprint:
        what += " places: the same shards are in another order"
    return (
        f"{what}. Restore the old shards, start a new run, or accept them with "
        "data.on_change next-epoch"
    )
