"""WebDataset shards: samples are the adjacent members of a tar that share a key.

The key is the member's path up to the first dot of its base name, as in the webdataset library. Only members with the
extensions in `EXTENSIONS` are read; a pickle is never opened. Whatever makes other readers lose samples in silence (a
cut file, a damaged header, members of a key that are not adjacent) is an error here.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import xxhash

from pipeline import local_files, storage
from pipeline.errors import DataError
from pipeline.formats.container import SUFFIXES, IndexedShard, WrittenShard
from pipeline.formats.tar import TarMember, TarScanner, end_mark, make_header
from pipeline.retry import explain
from pipeline.screen import TOO_MANY_BYTES, Probe, probe
from pipeline.shard_table import NO_LABEL, ShardTable, TableBuilder

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of images, best first: where a key has several, the first is the sample's image."""
EXTENSIONS = (*IMAGE_EXTENSIONS, "cls", "json", "txt")
"""Members that may be read; the rest is counted and passed over."""
SUFFIX = SUFFIXES["webdataset"]
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"^__[^/]*__($|/)")
_MAX_IMAGE_BYTES = 2**30
_MAX_TEXT_BYTES = 2**20
_to_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
_EXTENSION_OF = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def split_key(name: str) -> tuple[str, str] | None:
    """Return (key, extension in lower case) of a member's path, or nothing where it has no extension."""
    found = _MEMBER.match(name)
    return (found.group(1), found.group(2).lower()) if found else None


@dataclass(slots=True)
class _Sample:
    """The members of one key, as they come."""

    key: str
    header_offset: int
    components: list[tuple[str, int, int, str]] = field(default_factory=list)
    images: dict[str, tuple[TarMember, int, Probe | str]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


class _HashingStream:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.size_bytes += len(data)
        return data


def index_shard(uri: str) -> IndexedShard:
    """Read a tar once, from end to end, and return its samples' places, sizes and hashes.

    Raises:
        DataError: The tar is cut, damaged or badly made, or holds no sample. The message names the shard, the byte
            and how many members before it are whole.
    """
    name = storage.name_of(uri)
    with storage.open_read(uri) as file:
        stream = _HashingStream(file)
        indexer = _Indexer(TarScanner(stream, shard=storage.redact(uri)))
        table = indexer.run()
    if not len(table):
        raise DataError(
            f"{storage.redact(uri)}: no sample with an image ({', '.join(IMAGE_EXTENSIONS)}) in "
            f"{indexer.scanner.num_members} members; passed over: {dict(indexer.ignored)}."
        )
    return IndexedShard(
        name=name,
        size_bytes=stream.size_bytes,
        sha256=stream.digest.hexdigest(),
        table=table,
        dali_index=make_dali_index(indexer.components),
        ignored=dict(indexer.ignored),
        bad=indexer.bad,
    )


class _Indexer:
    """Groups a tar's members into samples."""

    def __init__(self, scanner: TarScanner) -> None:
        self.scanner = scanner
        self.components: list[list[tuple[str, int, int, str]]] = []
        self.ignored: Counter[str] = Counter()
        self.bad: list[tuple[str, str]] = []
        self._rows = TableBuilder()
        self._seen: set[str] = set()

    def run(self) -> ShardTable:
        current: _Sample | None = None
        for member in self.scanner:
            parts = split_key(member.name)
            if parts is None or _META.match(member.name):
                self.ignored["no key"] += 1
                continue
            key, extension = parts
            if current is None or current.key != key:
                self._finish(current)
                if key in self._seen:
                    raise self.scanner.error(
                        f"the key {key!r} comes again: its members are not adjacent, or two samples share it,",
                        offset=member.header_offset,
                    )
                self._seen.add(key)
                current = _Sample(key, member.header_offset)
            self._take(current, member, extension)
        self._finish(current)
        return self._rows.build()

    def _take(self, sample: _Sample, member: TarMember, extension: str) -> None:
        sample.components.append((extension, member.offset, member.size, member.name))
        if extension not in EXTENSIONS:
            self.ignored[f"extension .{extension}"] += 1
            return
        if extension in sample.images or extension in sample.texts:
            raise self.scanner.error(
                f"the key {sample.key!r} has two members .{extension}", offset=member.header_offset
            )
        if extension in IMAGE_EXTENSIONS:
            if member.size > _MAX_IMAGE_BYTES:
                digest = xxhash.xxh3_64()
                for part in self.scanner.read_chunks():
                    digest.update(part)
                sample.images[extension] = member, digest.intdigest(), TOO_MANY_BYTES
            else:
                data = self.scanner.read()
                sample.images[extension] = member, xxhash.xxh3_64_intdigest(data), probe(data)
        elif extension in ("cls", "json") and member.size <= _MAX_TEXT_BYTES:
            sample.texts[extension] = self.scanner.read()
        else:
            sample.texts[extension] = b""

    def _finish(self, sample: _Sample | None) -> None:
        if sample is None or not (sample.images or sample.texts):
            return
        chosen = next((name for name in IMAGE_EXTENSIONS if name in sample.images), None)
        if chosen is None:
            raise self.scanner.error(
                f"the key {sample.key!r} has no image ({', '.join(IMAGE_EXTENSIONS)}), "
                f"only {', '.join('.' + component[0] for component in sample.components)},",
                offset=sample.header_offset,
            )
        if len(sample.images) > 1:
            self.ignored["further images of a key"] += len(sample.images) - 1
        member, digest, found = sample.images[chosen]
        if isinstance(found, str):
            self.bad.append((sample.key, found))
            found = Probe("bad", 0, 0, "")
        self._rows.add(
            sample.key,
            offset=member.offset,
            size=member.size,
            label=self._label(sample),
            width=found.width,
            height=found.height,
            image_format=found.format,
            mode=found.mode,
            xxh3=digest,
        )
        self.components.append(sample.components)

    def _label(self, sample: _Sample) -> int:
        """Return the number in `.cls`, or `label` in `.json`, or -1."""
        value: object = None
        with suppress(ValueError, RecursionError):
            if "cls" in sample.texts:
                value = int(sample.texts["cls"].decode("ascii"))
            elif "json" in sample.texts:
                parsed = json.loads(sample.texts["json"])
                value = parsed.get("label") if isinstance(parsed, dict) else None
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31:
            return value
        if "cls" in sample.texts and value != NO_LABEL:
            self.ignored["labels that are no class number"] += 1
        return NO_LABEL


def make_dali_index(samples: list[list[tuple[str, int, int, str]]]) -> bytes:
    """Return an index file for DALI's `readers.webdataset`: v1.2, as its tool wds2idx writes.

    Args:
        samples: Per sample the (extension, data offset, size, member name) of its members.
    """
    lines = [f"v1.2 {len(samples)}"]
    for components in samples:
        if any(not name or name.split() != [name] or len(part.split()) != 1 for part, _, _, name in components):
            return b""
        lines.append(" ".join(f"{part} {offset} {size} {name}" for part, offset, size, name in components))
    return ("\n".join(lines) + "\n").encode()


class WebDatasetWriter:
    """Write one shard: streamed to a temporary file, in place only when whole.

    The bytes depend on what is added and its order alone: no time, owner or machine is stored. Use it as a context
    manager; leaving it by an exception removes the temporary file.

    Args:
        uri: Where the finished shard goes.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._tmp: Path | None = None
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._at = 0
        self._rows = TableBuilder()
        self._components: list[list[tuple[str, int, int, str]]] = []
        self._keys: set[str] = set()

    def __enter__(self) -> WebDatasetWriter:
        try:
            if storage.is_local(self._uri):
                target = storage.local_path(self._uri)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._tmp = local_files.tmp_path(target)
                self._file = self._tmp.open("xb")
            else:
                file = tempfile.NamedTemporaryFile(prefix="maelstrom-", suffix=SUFFIX, delete=False)
                self._tmp, self._file = Path(file.name), file  # type: ignore[assignment]
        except OSError as error:
            raise explain("write", self._uri, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            if self._tmp is not None:
                self._tmp.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, key: str, image: bytes, found: Probe, *, label: int = NO_LABEL, metadata: dict[str, Any] | None = None
    ) -> None:
        """Append one sample: `key.jpg` (by its format), `key.cls` where there is a label, `key.json` if given.

        Args:
            key: Path without dots or blanks, unique in the dataset.
            image: Encoded bytes, stored as they are.
            found: What the image's header says.
            label: Class number, -1 for none.
            metadata: Stored as JSON beside the image.

        Raises:
            DataError: The key cannot be stored, or the format has no place in a WebDataset.
            InfrastructureError: The disk is full or not writable.
        """
        extension = _EXTENSION_OF.get(found.format)
        if extension is None:
            raise DataError(f"{key}: a {found.format} image cannot be stored in a WebDataset; re-encode it (--resize).")
        if split_key(f"{key}.{extension}") != (key, extension) or key.split() != [key] or _META.match(key):
            raise DataError(f"{key!r} cannot be a WebDataset key: no dots in its last part, no blanks, no __name__.")
        if key in self._keys:
            raise DataError(f"{key!r} is already in {storage.name_of(self._uri)}: keys must be unique.")
        self._keys.add(key)
        members = [(extension, image)]
        if label != NO_LABEL:
            members.append(("cls", str(label).encode()))
        if metadata is not None:
            members.append(("json", _to_json(metadata).encode()))
        components = []
        small = b""  # what stands around the image goes out in one piece: calls cost more than bytes here
        for part, data in members:
            name = f"{key}.{part}"
            small += make_header(name, len(data))
            components.append((part, self._at + len(small), len(data), name))
            if data is image:
                self._write(small)
                self._write(data)
                small = bytes(-len(data) % 512)
            else:
                small += data + bytes(-len(data) % 512)
        self._write(small)
        self._components.append(components)
        self._rows.add(
            key,
            offset=components[0][1],
            size=len(image),
            label=label,
            width=found.width,
            height=found.height,
            image_format=found.format,
            mode=found.mode,
            xxh3=xxhash.xxh3_64_intdigest(image),
        )

    def _write(self, data: bytes) -> None:
        if self._file is None:
            raise RuntimeError("the writer is used outside its with block")
        try:
            self._file.write(data)
        except OSError as error:
            raise explain("write", self._uri, error) from error
        self._digest.update(data)
        self._at += len(data)

    def close(self) -> WrittenShard:
        """End the archive and put it in place.

        Raises:
            InfrastructureError: The disk is full or not writable.
        """
        self._write(end_mark(self._at))
        if self._file is None or self._tmp is None:
            raise RuntimeError("the writer is used outside its with block")
        try:
            self._file.close()
            if storage.is_local(self._uri):
                local_files.commit_file(self._tmp, storage.local_path(self._uri))
            else:
                storage.put_file(self._tmp, self._uri)
        except OSError as error:
            raise explain("write", self._uri, error) from error
        return WrittenShard(
            name=storage.name_of(self._uri),
            size_bytes=self._at,
            sha256=self._digest.hexdigest(),
            table=self._rows.build(),
            dali_index=make_dali_index(self._components),
        )
