"""The end of a conversion: what neighbours read, the list of refused images, the manifest, and last
`dataset.json`."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.console import say
from pipeline.convert.plan import Plan, tool_version
from pipeline.convert.shard import Part, finished_shard
from pipeline.convert.statistics import DatasetStatistics
from pipeline.dataset import DatasetInfo
from pipeline.dataset.writer import write_dataset
from pipeline.errors import DataError
from pipeline.formats.records import ShardIndex
from pipeline.images.left_out import LEFT_OUT_FILE, LeftOut, parse_left_out
from pipeline.sources.listing import Listing

REJECTED_FILE = "rejected.parquet"
UNTURNED_FILE = "not_upright.parquet"
STATS_FILE = "stats.json"


def commit(
    listing: Listing,
    dst: str,
    plan: Plan,
    parts: list[Part],
) -> DatasetInfo:
    """Write what neighbours read, the list of refused images, the manifest, and last
    `dataset.json`.

    Args:
        listing: What was converted.
        dst: Folder of the shards.
        plan: Of the conversion.
        parts: All shards, in order.

    Raises:
        DataError: No image could be used, or a part has vanished.
    """
    kept = [part for part in parts if part.file is not None]
    reasons = Counter(reason for part in parts for _, reason in part.rejected)
    if not kept:
        counts = ", ".join(
            f"{reason} ({count})" for reason, count in reasons.most_common()
        )
        raise DataError(
            f"convert: none of the {len(plan.order)} images in {storage.redact(listing.uri)} can "
            f"be used: {counts}. Check the source; {storage.redact(dst)} holds no dataset."
        )

    # All that lies beside the manifest comes before it: `dataset.json` is the commit.
    if reasons:
        rejected = [
            (name, str(reason)) for part in parts for name, reason in part.rejected
        ]
        _write_names(storage.join(dst, REJECTED_FILE), rejected)
    unturned = [row for part in parts for row in part.unturned]
    if unturned:
        _write_names(storage.join(dst, UNTURNED_FILE), unturned)
        say(
            f"convert: note: {len(unturned):,} images keep their EXIF orientation, as they cannot "
            f"be turned without loss; see {UNTURNED_FILE}"
        )
    _write_report(
        listing,
        dst,
        plan,
        stored=_num_stored(kept),
    )
    if plan.settings.format == "webdataset":
        for name, content in _neighbour_files(plan, kept).items():
            _write_json(storage.join(dst, name), content)

    statistics = DatasetStatistics()

    def shards() -> Iterator[ShardIndex]:
        for part in kept:
            shard = finished_shard(
                dst, part.stem, identity=plan.identity(), container=plan.settings.format
            )
            if shard is not None:
                statistics.add(shard.table)
                yield shard
        # The last table has passed through by now, and the manifest is not committed yet.
        if plan.settings.stats:
            sums = [part.pixels for part in kept if part.pixels]
            described = statistics.describe(sums, classes=listing.classes)
            _write_json(storage.join(dst, STATS_FILE), described)

    return write_dataset(
        dst,
        shards=shards(),
        name=plan.settings.split,
        container=plan.settings.format,
        classes=listing.classes,
        made_by={
            "tool": "pipeline.convert",
            "version": tool_version(),
            "plan": plan.describe(),
        },
        versions={"pyarrow": pa.__version__, **plan.describe()["versions"]},
    )


def _write_report(
    listing: Listing,
    dst: str,
    plan: Plan,
    *,
    stored: int,
) -> None:
    """Write what was left out, so that every file of the source can be accounted for."""
    left_out = all_left_out(listing, plan)
    if not left_out:
        return
    rejected = len(plan.order) - stored
    report = {
        "seen": stored + rejected + len(left_out),
        "stored": stored,
        "rejected": rejected,
        **left_out.to_json(),
    }
    _write_json(storage.join(dst, LEFT_OUT_FILE), report)


def _num_stored(kept: Sequence[Part]) -> int:
    return sum(part.file.num_samples for part in kept if part.file is not None)


def all_left_out(listing: Listing, plan: Plan) -> LeftOut:
    """Return what the listing left out, and what the plan did."""
    left_out = LeftOut()
    left_out.update(listing.left_out)
    beyond = len(listing) - len(plan.order)
    if beyond:
        left_out.count({"beyond --limit": beyond})
    return left_out


def rejected_reasons(dst: str) -> Counter[str]:
    """Return how many images of a finished conversion were rejected, by reason."""
    # From the file: a run that finds the dataset finished has no parts any more.
    uri = storage.join(dst, REJECTED_FILE)
    if not storage.exists(uri):
        return Counter()
    table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=["reason"])
    return Counter(str(reason) for reason in table["reason"].to_pylist())


def report_of(dst: str) -> LeftOut:
    """Return what a finished conversion left out."""
    uri = storage.join(dst, LEFT_OUT_FILE)
    return parse_left_out(storage.read_bytes(uri)) if storage.exists(uri) else LeftOut()


def _write_names(uri: str, rows: Sequence[tuple[str, str]]) -> None:
    """Write a list of images, each with a reason."""
    names = [name for name, _ in rows]
    reasons = [reason for _, reason in rows]
    table = pa.table({"key": names, "reason": reasons})
    with tempfile.TemporaryDirectory(prefix="maelstrom-names-") as folder:
        path = Path(folder) / storage.name_of(uri)
        pq.write_table(table, path)
        storage.put_file(path, uri)


def _neighbour_files(plan: Plan, kept: Sequence[Part]) -> dict[str, Any]:
    """Return what the wids library (`*-wids.json`) and timm (`_info.json`) read next to
    the tars."""
    split = plan.settings.split
    files = [part.file for part in kept if part.file is not None]
    names = [file.name for file in files]
    counts = [file.num_samples for file in files]
    shards = [
        {"url": file.name, "nsamples": file.num_samples, "filesize": file.size_bytes}
        for file in files
    ]
    info = {
        "name": split,
        "num_samples": sum(counts),
        "filenames": names,
        "shard_lengths": counts,
    }
    return {
        f"{split}-wids.json": {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": split,
            "shardlist": shards,
        },
        "_info.json": {"splits": {split: info}},
    }


def _write_json(uri: str, content: dict[str, Any]) -> None:
    text = json.dumps(
        content,
        indent=1,
        ensure_ascii=False,
    )
    storage.write_atomic(uri, text.encode() + b"\n")
