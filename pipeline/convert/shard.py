"""One shard of a conversion: a pure function of a slice of the source, run in a process of its own.

A finished shard leaves its file, for a tar its DALI index, and its part, a small Parquet file with
the shard's rows. The part is written last: where it is, and carries this plan's identity, the shard
is done.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
from dataclasses import asdict, dataclass
from multiprocessing import connection
from multiprocessing.synchronize import Event

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.convert.settings import ConvertSettings
from pipeline.errors import DataError, MaelstromError
from pipeline.formats.beton_writer import BetonWriter, storable
from pipeline.formats.records import ShardFile, ShardIndex, suffix_of
from pipeline.formats.table import ShardTable, TableBuilder
from pipeline.formats.webdataset_writer import WebDatasetWriter
from pipeline.images.encode import reencode, shrunk_size, to_pixels
from pipeline.images.header import Probe, screen
from pipeline.images.pixel_sums import PixelSums
from pipeline.images.refused import Reason, Refused
from pipeline.sources.choose import open_source
from pipeline.sources.listing import SourceKind, Wanted

PARTS_FOLDER = "_parts"
_STORED_FORMATS = ("jpeg", "png", "webp")
_PART_KEY = b"maelstrom"


class StoppedError(MaelstromError):
    """Another task failed or the user stopped the conversion; this one has cleaned up behind
    itself."""


@dataclass(frozen=True)
class ShardTask:
    """What one shard is made of.

    Args:
        source: URI of the source.
        source_kind: What the source is.
        target: URI of the dataset's folder.
        stem: The shard's name without extension.
        identity: Of the plan it belongs to.
        settings: Of the conversion.
        wanted: Images in stored order.
        keys: Their keys.
        labels: Their class numbers.
        classes: Class names.
    """

    source: str
    source_kind: SourceKind
    target: str
    stem: str
    identity: str
    settings: ConvertSettings
    wanted: Wanted
    keys: list[str]
    labels: list[int]
    classes: list[str] | None


@dataclass(frozen=True)
class Part:
    """A shard that is done.

    Args:
        stem: The shard's name without extension.
        file: The shard file; None if every image of its slice was refused, so that there is none.
        num_images: Images looked at.
        read_bytes: Bytes of those images.
        rejected: File name and reason of each that was refused.
        pixels: Sums over the stored images, where the settings ask for them.
    """

    stem: str
    file: ShardFile | None
    num_images: int
    read_bytes: int
    rejected: list[tuple[str, Reason]]
    pixels: PixelSums | None = None


def part_uri(target: str, stem: str) -> str:
    """Return where a shard's part is kept until the dataset is whole."""
    return storage.join(target, PARTS_FOLDER, f"{stem}.parquet")


def read_part(
    target: str, stem: str, *, identity: str, container: str
) -> tuple[Part, ShardTable] | None:
    """Return a finished part and its rows, or None if it belongs to another plan or cannot be
    read."""
    try:
        data = storage.read_bytes(part_uri(target, stem))
        rows = pq.read_table(pa.BufferReader(data))
        head = json.loads((rows.schema.metadata or {})[_PART_KEY])
        if head["identity"] != identity:
            return None
        table = ShardTable.from_arrow(rows)
        file = None
        if head["num_samples"]:
            # A part that version 0.1.0 wrote has no content hash.
            content_hash = head.get("content_hash") or table.content_hash()
            name = stem + suffix_of(container)
            counts = head["num_samples"], head["size_bytes"]
            file = ShardFile(name, *counts, head["sha256"], content_hash)
        part = Part(
            stem=head["stem"],
            file=file,
            num_images=head["num_images"],
            read_bytes=head["read_bytes"],
            rejected=[(name, Reason(reason)) for name, reason in head["rejected"]],
            pixels=PixelSums(**head["pixels"]) if head.get("pixels") else None,
        )
    except (DataError, pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        return None  # whatever is wrong with it, making the shard again puts it right
    return part, table


def finished_shard(target: str, stem: str, *, identity: str, container: str) -> ShardIndex | None:
    """Return a finished part as the dataset's shard; None if it has no shard file."""
    found = read_part(target, stem, identity=identity, container=container)
    if found is None:
        raise DataError(
            f"convert: {part_uri(target, stem)} has vanished or changed. Run the same command "
            "again."
        )
    part, table = found
    return None if part.file is None else ShardIndex(part.file, table)


def make_shard(task: ShardTask, stop: Event | None = None) -> Part:
    """Make one shard file, its index and its part.

    Args:
        task: What it is made of.
        stop: When set, give up at the next image.

    Raises:
        DataError: An image has vanished, or one was refused and the settings say strict.
        InfrastructureError: The source cannot be read, or the target not written.
        StoppedError: `stop` was set.
    """
    rejected: list[tuple[str, Reason]] = []
    size_read = 0
    pixels = PixelSums() if task.settings.stats else None
    source = open_source(task.source, task.settings, kind=task.source_kind)
    uri = storage.join(task.target, task.stem + suffix_of(task.settings.format))
    with BetonWriter(uri) if task.settings.format == "ffcv" else WebDatasetWriter(uri) as writer:
        for place, data in enumerate(source.read_all(task.wanted)):
            if stop is not None and stop.is_set():
                raise StoppedError("stopped")
            name = task.wanted.names[place]
            if "://" in name:
                name = storage.redact(name)
            size_read += 0 if isinstance(data, Refused) else len(data)
            made = data if isinstance(data, Refused) else prepare(data, task.settings)
            if isinstance(made, Refused):
                if task.settings.strict:
                    raise DataError(
                        f"convert: {name}: {made}. Without --strict it would be left out."
                    )
                rejected.append((name, made.reason))
                continue
            found, stored = made
            label = task.labels[place]
            known = task.classes is not None and 0 <= label < len(task.classes)
            class_name = task.classes[label] if task.classes and known else None
            about = source.about(task.wanted.names[place], class_name=class_name)
            if pixels is not None:
                pixels.add(stored, found)
            writer.add(task.keys[place], stored, found, label=label, metadata=about)
        if len(writer):
            written = writer.close()
            if written.dali_index:
                storage.write_atomic(
                    storage.join(task.target, f"{task.stem}.idx"), written.dali_index
                )
            file, table = written.file, written.table
        else:
            file, table = None, TableBuilder().build()
    part = Part(task.stem, file, len(task.wanted), size_read, rejected, pixels)
    _write_part(task, part, table)
    return part


def prepare(data: bytes, settings: ConvertSettings) -> tuple[Probe, bytes] | Refused:
    """Return what the header says and the bytes to store, or why the image is refused."""
    found = screen(data, settings.limits)
    if isinstance(found, Refused):
        return found
    if settings.format == "ffcv" and _as_pixels(found, settings):
        return to_pixels(data, short_side=settings.resize, long_side=settings.max_resolution)
    if settings.resizes:
        smaller = reencode(
            data,
            found,
            short_side=settings.resize,
            long_side=settings.max_resolution,
            quality=settings.quality,
        )
        if isinstance(smaller, Refused):
            return smaller
        found, data = screen(smaller, settings.limits), smaller
        if isinstance(found, Refused):
            return found
    # GIF, BMP and TIFF have no place in a WebDataset; a beton stores only RGB and grey JPEG.
    fits = storable(found) if settings.format == "ffcv" else found.format in _STORED_FORMATS
    return (found, data) if fits else Refused(Reason.NEEDS_RESIZE)


def _as_pixels(found: Probe, settings: ConvertSettings) -> bool:
    if settings.write_mode != "smart":
        return settings.write_mode == "raw"
    width, height = shrunk_size(
        found.width, found.height, short_side=settings.resize, long_side=settings.max_resolution
    )
    return width * height * 3 <= settings.smart_threshold_bytes


def _write_part(task: ShardTask, part: Part, table: ShardTable) -> None:
    head = {
        "identity": task.identity,
        "stem": part.stem,
        "num_samples": part.file.num_samples if part.file else 0,
        "size_bytes": part.file.size_bytes if part.file else 0,
        "sha256": part.file.sha256 if part.file else "",
        "content_hash": part.file.content_hash if part.file else "",
        "num_images": part.num_images,
        "read_bytes": part.read_bytes,
        "rejected": part.rejected,
        "pixels": None if part.pixels is None else asdict(part.pixels),
    }
    rows = table.to_arrow().replace_schema_metadata({_PART_KEY: json.dumps(head).encode()})
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd", write_statistics=False)
    storage.write_atomic(part_uri(task.target, task.stem), buffer.getvalue())


class Worker:
    """State of one worker process, set up when it starts."""

    stop: Event | None = None


def start_worker(stop: Event, environment: dict[str, str]) -> None:
    """Set up a worker process: Ctrl-C is the parent's business, and the parent's death ends the
    worker.

    Args:
        stop: When set, workers give up.
        environment: The parent's. The process that workers are forked off keeps the one it was
            started with, and credentials may have changed since.
    """
    Worker.stop = stop
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(
            target=_end_with, args=(parent.sentinel,), name="parent-watch", daemon=True
        ).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    # A killed parent cannot stop its workers: without this they would wait for work for ever.
    os._exit(1)


def make_shard_in_worker(task: ShardTask) -> Part:
    """Make one shard in a worker process that `start_worker` has set up."""
    return make_shard(task, Worker.stop)
