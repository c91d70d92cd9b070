"""A dataset as the source of another: tars to betons and back, with every key, label, byte and
shard kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.dataset import Manifest, open_dataset
from pipeline.formats.beton_index import read_metas
from pipeline.formats.table import FORMATS, NO_LABEL
from pipeline.formats.tar import TarScanner
from pipeline.formats.webdataset import split_key
from pipeline.images.encode import as_png
from pipeline.images.left_out import LeftOut
from pipeline.images.refused import Refused
from pipeline.sources.listing import Listing, SourceSettings, Wanted, read_each
from pipeline.sources.names import sample_keys

_UNFIT_KEY = r"[.][^/]*$|\s|^__[^/]*__"
"""Keys that a WebDataset cannot hold: a dot in the last part, blanks, the library's own names."""
_MAX_TEXT_BYTES = 2**20


class DatasetSource:
    """The samples of a dataset in stored order. A sample's name is `shard number/row/key`.

    Raw pixels are given as PNG, which loses nothing.

    Args:
        uri: The dataset's folder.
        settings: Labels `none` drops the labels; otherwise they are kept.
    """

    def __init__(self, uri: str, settings: SourceSettings | None = None) -> None:
        self.uri = uri
        settings = settings or SourceSettings()
        self._labels = settings.labels
        self._image_component = settings.image_component
        self._opened: Manifest | None = None
        self._texts: dict[int, list[dict[str, Any] | None]] = {}

    def _manifest(self) -> Manifest:
        if self._opened is None:
            component = self._image_component
            self._opened = open_dataset(self.uri, image_component=component)
        return self._opened

    def listing(self) -> Listing:
        """Return the dataset's samples in stored order."""
        manifest = self._manifest()
        names: list[pa.StringArray] = []
        keys: list[pa.StringArray] = []
        sizes, labels = [], []
        for s in range(manifest.info.num_shards):
            table = manifest.shard_table(s)
            keys_of_shard = table.keys
            names_of_shard = [
                f"{s}/{row}/{key}" for row, key in enumerate(keys_of_shard)
            ]
            # As Arrow's: Python objects of all samples would take ten times the memory.
            keys.append(pa.array(keys_of_shard, pa.string()))
            names.append(pa.array(names_of_shard, pa.string()))
            sizes.append(table.sizes)
            labels.append(table.labels)
        all_keys = pa.concat_arrays(keys)
        # Keys made elsewhere may be such that a WebDataset cannot hold them, or occur twice.
        is_unfit = pc.match_substring_regex(all_keys, _UNFIT_KEY)
        has_unfit = pc.any(is_unfit).as_py()
        num_distinct = len(all_keys.unique())
        has_repeated = num_distinct != len(all_keys)
        if has_unfit or has_repeated:
            all_keys = sample_keys(all_keys)

        # Conversions that an older version began have other keys: they must not be continued.
        fingerprint = manifest.info.fingerprint
        if has_repeated:
            fingerprint += "/keys-2"
        # What the first conversion left out is still missing from the second.
        left_out = LeftOut()
        left_out_before = manifest.info.made_by.get("left_out") or {}
        left_out.count(left_out_before)
        all_labels = np.concatenate(labels)
        classes = manifest.info.classes
        if self._labels == "none":
            all_labels = np.full_like(all_labels, NO_LABEL)
            classes = None
        return Listing(
            uri=self.uri,
            names=pa.concat_arrays(names),
            sizes=np.concatenate(sizes),
            labels=all_labels,
            classes=classes,
            passed_over=dict(left_out.counts),
            kind="dataset",
            keys=all_keys,
            bounds=manifest.shard_starts,
            fingerprint=fingerprint,
            left_out=left_out,
        )

    def read_all(self, wanted: Wanted) -> Iterator[bytes | Refused]:
        """Yield the images' files."""

        def read(i: int) -> bytes:
            name = wanted.names[i]
            return self._read(name)

        return read_each(self.uri, read, len(wanted))

    def _read(self, name: str) -> bytes:
        s, row = _position(name)
        manifest = self._manifest()
        table = manifest.shard_table(s)
        uri = manifest.shard_uri(s)
        offset = int(table.offsets[row])
        size = int(table.sizes[row])
        data = storage.read_bytes(uri, offset, size)
        image_format = FORMATS[table.formats[row]]
        if image_format != "raw":
            return data
        # Bare pixels have no header: the table alone knows their shape.
        width = int(table.widths[row])
        height = int(table.heights[row])
        return as_png(data, width, height)

    def about(self, name: str, *, class_name: str | None) -> dict[str, Any] | None:
        """Return the JSON that is stored beside the image, as it is."""
        s, row = _position(name)
        if s not in self._texts:
            # Samples come shard by shard: the texts of one shard at a time are enough.
            self._texts = {s: self._read_texts(s)}
        return self._texts[s][row]

    def _read_texts(self, s: int) -> list[dict[str, Any] | None]:
        manifest = self._manifest()
        uri = manifest.shard_uri(s)
        if manifest.info.format == "ffcv":
            return read_metas(uri)
        texts: dict[str, dict[str, Any]] = {}
        read: dict[str, bytes] = {}
        with storage.open_read(uri) as file:
            scanner = TarScanner(file, shard=manifest.shard_name(s), links="yield")
            for member in scanner:
                parts = split_key(member.name)
                if parts is None:
                    continue
                key, extension = parts
                # A text of megabytes does not describe one image.
                if extension != "json" or member.size > _MAX_TEXT_BYTES:
                    continue
                # A link has the bytes of a member before it.
                linked = member.link_to
                if linked is None:
                    data = scanner.read()
                else:
                    data = read.get(linked, b"")
                name = member.name.removeprefix("./")
                read[name] = data
                value = _parse(data)
                if value is not None:
                    texts[key] = value
        keys = manifest.shard_table(s).keys
        return [texts.get(key) for key in keys]


def _position(name: str) -> tuple[int, int]:
    s, row, _ = name.split("/", 2)
    return int(s), int(row)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # A list or a bare number is valid JSON, but has no names to be stored under.
    if isinstance(value, dict):
        return value
    return None
