"""Turn a folder of images into shards: `python -m pipeline.convert SRC DST`.

The dataset exists when `dataset.json` does, and not before. Until then `_plan.json` marks the
folder; the same command makes only the missing shards, with the same bytes as a run that was never
stopped.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.convert.__main__")

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline import storage
from pipeline.console import run_command, say, say_json
from pipeline.convert.commit import (
    REJECTED_FILE,
    STATS_FILE,
    all_left_out,
    rejected_reasons,
    report_of,
)
from pipeline.convert.conversion import convert_job
from pipeline.convert.plan import make_plan
from pipeline.convert.settings import OPTION_NAMES, ConvertSettings
from pipeline.convert.shard import prepare
from pipeline.convert.target import Job, check_target, find_finished, parse_job
from pipeline.convert.workers import Engine, Workers, cores
from pipeline.dataset import DatasetInfo
from pipeline.dataset.unpacked import unpacked
from pipeline.errors import ConfigError
from pipeline.images.left_out import LEFT_OUT_FILE
from pipeline.images.refused import Refused
from pipeline.options import Location, Parallel
from pipeline.sources.choose import list_source, open_source

_MOST_NAMED = 20
"""Files left out that `--json` names per reason; left_out.json names more."""
_TRIED_IMAGES = 48
"""Images that a dry run prepares to estimate the time and size of all of them."""
_OVERHEAD_BYTES = 2_600
"""Bytes that a tar adds per image: three headers, padding, label and JSON."""


@dataclass(frozen=True)
class Arguments:
    """Turn any collection of images into shards with an index.

    SRC is one of: a folder with a folder per class (labels number the sorted folder names); a flat
        folder (no labels); a tar of images or of class tars, such as ILSVRC2012_img_train.tar; a
    dataset of tars or betons, which keeps its order, keys, labels and shards; Parquet files with
    images in them; a .csv, .tsv or .parquet list of URIs and labels. A tar whose neighbours share a
    key with .cls, .json or .txt is a shard of a dataset. Tars may be packed with gzip: they are
    unpacked into TMPDIR first. Shards and Parquet files are given by their folder, as a pattern in
    quotes ('data/train-*.tar', 'data/train-{0000..0003}.tar') or as a list with commas. A folder
    that holds train and validation files, or the folders train and val, is refused: give one of
    them.

    DST becomes the dataset: shards, manifest.parquet, dataset.json. You can stop at any time: the
    same command continues. The last line accounts for every file that was seen: stored + rejected
    (rejected.parquet) + left out (left_out.json). Hidden files (a leading dot, __MACOSX, @eaDir,
    Thumbs.db, ...) decide nothing.
    """

    src: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Images: a path, s3://, gs:// or az://; a single file also https://."""
    dst: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder for the shards: new, empty, or of this unfinished conversion."""
    workers: Parallel = 0
    """Processes. 0: one per core. The result does not depend on it, nor on the engine."""
    engine: Engine = "local"
    """local: processes on this machine. ray: Ray tasks, one per shard; every node must see the same
    SRC and DST."""
    ray_address: str | None = None
    """Ray cluster to use, for example auto or ray://head:10001. None: start Ray on this machine."""
    shards: str | None = None
    """I/N: make only shards I, I + N, ... (I from 0), for an array of jobs. The last job to finish
    commits the dataset."""
    dry_run: bool = False
    """Report what would be made, and write no file."""
    json: bool = False
    """Write the result to stdout as JSON."""


def _command_line() -> type[Arguments]:
    """Return `Arguments` with an option per setting; names, help and defaults are the settings'."""
    options: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(ConvertSettings)
    for name, field in ConvertSettings.model_fields.items():
        if name == "limits":  # a group of its own, which has no option
            continue
        # Texts are read by the settings themselves: sizes with a unit, and the seed `none`.
        as_text = name in OPTION_NAMES or name == "shuffle_seed"
        kind = str if as_text else hints[name]
        default = str(field.default) if as_text else field.default
        documented = Annotated[kind, tyro.conf.arg(help=field.description)]  # type: ignore[valid-type]
        options.append((OPTION_NAMES.get(name, name), documented, default))
    bases = (Arguments,)
    # Without it --help would show the generated signature in place of the description.
    described = {"__doc__": Arguments.__doc__}
    return make_dataclass(
        "ConvertArguments", options, bases=bases, namespace=described, frozen=True
    )


def _settings(arguments: Arguments) -> ConvertSettings:
    """Read the settings out of the options; all mistakes are reported at once."""
    values = {
        name: getattr(arguments, OPTION_NAMES.get(name, name))
        for name in ConvertSettings.model_fields
        if name != "limits"
    }
    try:
        return ConvertSettings(**values)
    except ValidationError as error:
        mistakes = "; ".join(_mistake(details) for details in error.errors())
        raise ConfigError(f"convert: {mistakes}") from None


def _mistake(details: ErrorDetails) -> str:
    """Say what is wrong with one option."""
    problem = details["msg"].removeprefix("Value error, ")
    if not details["loc"]:  # options that do not fit together: the problem names them
        return problem
    name = str(details["loc"][0])
    if details["type"].startswith("byte_size"):
        problem = "is not a valid size. Write it as 256MB, 1GB, 512MiB or in bytes"
    if name == "shuffle_seed":
        problem = "is not a valid seed. Give a whole number from 0 to 2^64 - 1, or none"
    option = OPTION_NAMES.get(name, name).replace("_", "-")
    return f"--{option} {details['input']!r}: {problem}"


def _dry_run(arguments: Arguments, settings: ConvertSettings) -> dict[str, Any]:
    """Plan the conversion and prepare some of its images, without writing."""
    check_target(arguments.src, arguments.dst)
    with unpacked(arguments.src) as src:
        return _try_some(
            src,
            arguments,
            settings,
        )


def _try_some(
    src: str,
    arguments: Arguments,
    settings: ConvertSettings,
) -> dict[str, Any]:
    source = open_source(src, settings)
    listing = list_source(source, src, settings)
    plan = make_plan(listing, settings)
    finished = find_finished(arguments.dst, plan)

    # The stored order is shuffled, so that its first images are a fair sample of all of them.
    start_s = time.perf_counter()
    tried = 0
    stored_bytes = 0
    refused = 0
    for data in source.read_all(listing.wanted(plan.order[:_TRIED_IMAGES])):
        made = data if isinstance(data, Refused) else prepare(data, settings)
        tried += 1
        refused += isinstance(made, Refused)
        num_bytes = 0 if isinstance(made, Refused) else len(made[1])
        stored_bytes += num_bytes + _OVERHEAD_BYTES
    elapsed_s = time.perf_counter() - start_s

    left_out = all_left_out(listing, plan)
    num_images = len(plan.order)
    num_workers = arguments.workers or cores()
    estimated_s = elapsed_s / max(1, tried) * num_images / num_workers
    return {
        "num_images": num_images,
        "source_bytes": int(listing.sizes[plan.order].sum()),
        "num_classes": len(listing.classes or []),
        "num_shards": plan.num_shards,
        "estimated_bytes": round(stored_bytes / max(1, tried) * num_images),
        "estimated_s": round(estimated_s, 1),
        "tried": tried,
        "refused": refused,
        "passed_over": dict(left_out.counts),
        "notes": left_out.notes,
        "finished": finished is not None,
    }


def _say_planned(planned: dict[str, Any]) -> None:
    """Write the answer of a dry run for a person."""
    _say_notes(planned["notes"])
    skipped = ", ".join(
        f"{count:,} {reason}" for reason, count in planned["passed_over"].items()
    )
    size_mb = planned["source_bytes"] / 1e6
    estimated_mb = planned["estimated_bytes"] / 1e6
    say(
        f"convert: would make {planned['num_shards']:,} shards of {planned['num_images']:,} images "
        f"({size_mb:,.1f} MB, {planned['num_classes']:,} classes): about {estimated_mb:,.1f} MB in "
        f"{planned['estimated_s']:,.0f} s. Estimated from {planned['tried']} images, of which "
        f"{planned['refused']} were refused. {f'Skipped: {skipped}. ' if skipped else ''}"
        "No file was written."
    )


def _say_notes(notes: list[str]) -> None:
    for note in notes:
        say(f"convert: note: {note}")


def _say_made(
    arguments: Arguments,
    settings: ConvertSettings,
    info: DatasetInfo,
) -> None:
    """Write what a finished conversion holds, for a program or for a person; from it every file
    that was seen can be accounted for."""
    num_rejected = info.made_by["plan"]["num_images"] - info.num_samples
    rejected = rejected_reasons(arguments.dst) if num_rejected else Counter()
    left_out = report_of(arguments.dst)
    num_seen = info.num_samples + num_rejected + len(left_out)
    if arguments.json:
        first = {
            reason: names[:_MOST_NAMED] for reason, names in left_out.names.items()
        }
        say_json(
            {
                "dataset": storage.redact(arguments.dst),
                "finished": True,
                "num_samples": info.num_samples,
                "num_shards": info.num_shards,
                "num_rejected": num_rejected,
                "rejected": dict(rejected.most_common()),
                "num_left_out": len(left_out),
                "left_out": dict(left_out.counts.most_common()),
                "left_out_names": first,
                "notes": left_out.notes,
                "num_seen": num_seen,
                "fingerprint": info.fingerprint,
            }
        )
        return
    _say_notes(left_out.notes)
    counted = [f"{info.num_samples:,} stored"]
    if num_rejected:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in rejected.most_common()
        )
        counted.append(f"{num_rejected:,} rejected ({reasons}; see {REJECTED_FILE})")
    if left_out.counts:
        counted.append(
            f"{len(left_out):,} left out ({left_out.say()}; see {LEFT_OUT_FILE})"
        )
    stats = f"; see {STATS_FILE}" if settings.stats else ""
    say(
        f"convert: {info.num_samples:,} images in {info.num_shards:,} shards at "
        f"{arguments.dst}{stats}. Seen {num_seen:,} = {' + '.join(counted)}"
    )


def _run(arguments: Arguments) -> int:
    """Do what the command line asks for and return the exit code."""
    settings = _settings(arguments)
    if arguments.workers < 0:
        raise ConfigError(
            f"convert: --workers {arguments.workers}: expected 0 (one per core) or more."
        )
    if arguments.ray_address is not None and arguments.engine != "ray":
        raise ConfigError("convert: --ray-address needs --engine ray.")
    job = Job() if arguments.shards is None else parse_job(arguments.shards)

    if arguments.dry_run:
        planned = _dry_run(arguments, settings)
        if arguments.json:
            say_json(planned)
        else:
            _say_planned(planned)
        return 0

    workers = Workers(
        arguments.engine,
        arguments.workers,
        arguments.ray_address,
    )
    info = convert_job(
        arguments.src,
        arguments.dst,
        settings,
        job=job,
        workers=workers,
    )
    if info is not None:
        _say_made(
            arguments,
            settings,
            info,
        )
    elif arguments.json:  # other jobs of the array still have shards to make
        say_json({"dataset": storage.redact(arguments.dst), "finished": False})
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(
        _run,
        _command_line(),
        args,
        module="pipeline.convert",
        interrupted=(
            "convert: stopped. Finished shards are kept: run the same command again to continue."
        ),
    )
