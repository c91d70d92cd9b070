"""Turn a folder of images into shards: `python -m pipeline.convert SRC DST`.

The dataset is there when `dataset.json` is, and not before. Until then `_plan.json` marks the
folder; the same command goes on where it was stopped and makes only the missing shards, byte for
byte what an undisturbed run makes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from pydantic import ValidationError

from pipeline import storage
from pipeline.console import run_command, say, say_json
from pipeline.convert.commit import REJECTED_FILE, STATS_FILE
from pipeline.convert.conversion import convert_share
from pipeline.convert.crew import Crew, Engine, cores
from pipeline.convert.plan import Container, ConvertSettings, WriteMode, make_plan, parse_size
from pipeline.convert.shard import prepare
from pipeline.convert.target import Share, check_places, find_finished, parse_share
from pipeline.dataset import DatasetInfo
from pipeline.errors import ConfigError
from pipeline.sources.choose import open_source
from pipeline.sources.listing import LabelMode

_TRIED_IMAGES = 48
"""Images that a dry run prepares to tell how long all of them will take."""
_OVERHEAD_BYTES = 2_600
"""What a tar adds to an image: three headers, paddings, label and JSON."""


@dataclass(frozen=True)
class Arguments:
    """Turn any collection of images into shards with an index.

    SRC is a folder of class folders (labels are the sorted folder names) or a flat one (no labels);
    a tar of images or of class tars, such as ILSVRC2012_img_train.tar; Parquet files with images in
    them, by folder or as "data/train-*.parquet"; a .csv, .tsv or .parquet list of URIs and labels;
    or a dataset of tars or betons, which keeps its order, keys, labels and shards. DST becomes the
    dataset: shards, manifest.parquet, dataset.json. Stop and run again as you like: the same
    command goes on.
    """

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Images: a path, s3://, gs:// or az://; files also https://."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder of the shards: new, empty, or this conversion's own."""
    format: Container = "webdataset"
    """Container of the shards: tars, or FFCV's betons."""
    write_mode: WriteMode = "jpg"
    """ffcv: jpg stores JPEG files (as they are unless resized), raw stores pixels, smart stores
    small images raw."""
    smart_threshold: str = "256KiB"
    """ffcv, smart: pixels (height x width x 3 bytes) up to this size are stored raw."""
    shard_size: str = "256MB"
    """Size a shard should have (MB, GB, MiB, GiB); an estimate with --resize."""
    samples_per_shard: int | None = None
    """Images of a shard, instead of --shard-size."""
    resize: int | None = None
    """Shorter side in pixels that larger images are shrunk to. None: images are stored as they
    are."""
    max_resolution: int | None = None
    """Longer side in pixels that larger images are shrunk to. None: no limit."""
    quality: int = 90
    """JPEG quality (1-100) of images that are shrunk."""
    workers: int = 0
    """Processes. 0: as many as there are cores. The result does not depend on it, nor on the
    engine."""
    engine: Engine = "local"
    """local: processes of this machine. ray: Ray tasks, one a shard; SRC and DST must be the same
    on every node."""
    ray_address: str | None = None
    """Cluster to use, such as auto or ray://head:10001. None: Ray is started on this machine."""
    shards: str | None = None
    """I/N: make only shards I, I + N, ... (I from 0), for an array of jobs. The last to finish
    commits the dataset."""
    shuffle_seed: str = "0"
    """Seed of the order images are stored in, or none: by name. A dataset keeps its order."""
    split: str = "train"
    """Name of the dataset and first part of the shards' names."""
    limit: int | None = None
    """Images to take, the first in the stored order. None: all."""
    labels: LabelMode = "auto"
    """folders: the first folder is the class. none: no labels. auto: folders, where every image
    lies in one."""
    ground_truth: str | None = None
    """Labels of a flat folder or tar: ImageNet's devkit (.tar.gz or folder), or a text file of
    classes."""
    synsets: str | None = None
    """meta.mat, or a text file of `ILSVRC2012_ID class`, for a --ground-truth of numbers."""
    image_column: str | None = None
    """Column of images or URIs in a table. None: found by its name."""
    label_column: str | None = None
    """Column of labels in a table. None: found by its name."""
    stats: bool = False
    """Decode what is stored and write stats.json: mean and deviation of the pixels, sizes, class
    counts."""
    dry_run: bool = False
    """Say what would be made, and write nothing."""
    strict: bool = False
    """Stop with exit code 3 at the first image that cannot be used, instead of leaving it out."""
    json: bool = False
    """Write the result to stdout as JSON."""


def _settings(arguments: Arguments) -> ConvertSettings:
    seed = arguments.shuffle_seed.strip().lower()
    if seed != "none" and not seed.isdecimal():
        raise ConfigError(
            f"convert: --shuffle-seed {arguments.shuffle_seed!r}: give a number from 0, or none."
        )
    try:
        return ConvertSettings(
            format=arguments.format,
            write_mode=arguments.write_mode,
            smart_threshold_bytes=parse_size(arguments.smart_threshold, option="--smart-threshold"),
            max_resolution=arguments.max_resolution,
            shard_size_bytes=parse_size(arguments.shard_size),
            samples_per_shard=arguments.samples_per_shard,
            resize=arguments.resize,
            quality=arguments.quality,
            shuffle_seed=None if seed == "none" else int(seed),
            split=arguments.split,
            limit=arguments.limit,
            labels=arguments.labels,
            ground_truth=arguments.ground_truth,
            synsets=arguments.synsets,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
            stats=arguments.stats,
            strict=arguments.strict,
        )
    except ValidationError as error:
        found = "; ".join(
            f"--{'-'.join(str(part) for part in item['loc']).replace('_', '-')} {item['input']!r}: "
            f"{item['msg']}"
            for item in error.errors()
        )
        raise ConfigError(f"convert: {found}") from None


def _dry_run(arguments: Arguments, settings: ConvertSettings) -> dict[str, Any]:
    check_places(arguments.src, arguments.dst)
    source = open_source(arguments.src, settings)
    listing = source.listing()
    plan = make_plan(listing, settings)
    found = find_finished(arguments.dst, plan)
    start_s = time.perf_counter()
    tried, stored, refused = 0, 0, 0
    for data in source.read_all(listing.wanted(plan.order[:_TRIED_IMAGES])):
        probed, kept = (data, b"") if isinstance(data, str) else prepare(data, settings)
        tried += 1
        refused += isinstance(probed, str)
        stored += len(kept) + _OVERHEAD_BYTES
    seconds = (time.perf_counter() - start_s) / max(1, tried) * len(plan.order)
    return {
        "num_images": len(plan.order),
        "source_bytes": int(listing.sizes[plan.order].sum()),
        "num_classes": len(listing.classes or []),
        "num_shards": plan.num_shards,
        "estimated_bytes": round(stored / max(1, tried) * len(plan.order)),
        "estimated_s": round(seconds / (arguments.workers or cores()), 1),
        "tried": tried,
        "refused": refused,
        "passed_over": listing.passed_over,
        "finished": found is not None,
    }


def _say_planned(planned: dict[str, Any]) -> None:
    other = ", ".join(f"{count:,} {suffix}" for suffix, count in planned["passed_over"].items())
    say(
        f"convert: would make {planned['num_shards']:,} shards of {planned['num_images']:,} images "
        f"({planned['source_bytes'] / 1e6:,.1f} MB, {planned['num_classes']:,} classes), about "
        f"{planned['estimated_bytes'] / 1e6:,.1f} MB in {planned['estimated_s']:,.0f} s (by "
        f"{planned['tried']} images, "
        f"{planned['refused']} of them refused)"
        f"{'; passed over: ' + other if other else ''}; nothing was written"
    )


def _run(arguments: Arguments) -> int:
    settings = _settings(arguments)
    if arguments.workers < 0:
        raise ConfigError(f"convert: --workers {arguments.workers}: at least 0.")
    if arguments.ray_address is not None and arguments.engine != "ray":
        raise ConfigError("convert: --ray-address is for --engine ray.")
    share = parse_share(arguments.shards) if arguments.shards is not None else Share()
    if arguments.dry_run:
        planned = _dry_run(arguments, settings)
        if arguments.json:
            say_json(planned)
        else:
            _say_planned(planned)
        return 0
    crew = Crew(arguments.engine, arguments.workers, arguments.ray_address)
    info = convert_share(arguments.src, arguments.dst, settings, share=share, crew=crew)
    if info is None:
        if arguments.json:
            say_json({"dataset": storage.redact(arguments.dst), "finished": False})
        return 0
    _say_made(arguments, info)
    return 0


def _say_made(arguments: Arguments, info: DatasetInfo) -> None:
    num_rejected = info.made_by["plan"]["num_images"] - info.num_samples
    if arguments.json:
        say_json(
            {
                "dataset": storage.redact(arguments.dst),
                "finished": True,
                "num_samples": info.num_samples,
                "num_shards": info.num_shards,
                "num_rejected": num_rejected,
                "fingerprint": info.fingerprint,
            }
        )
        return
    left_out = f"; {num_rejected:,} images left out, see {REJECTED_FILE}" if num_rejected else ""
    stats = f"; see {STATS_FILE}" if arguments.stats else ""
    say(
        f"convert: {info.num_samples:,} images in {info.num_shards:,} shards at "
        f"{arguments.dst}{left_out}{stats}"
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = tyro.cli(
        Arguments,
        args=args,
        prog="python -m pipeline.convert",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return run_command(
        lambda: _run(arguments),
        interrupted=(
            "convert: stopped. Finished shards are kept; the same command goes on from here."
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
