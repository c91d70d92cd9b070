"""Loader-only throughput: `python -m pipeline.bench URI`; next to other loaders: `python -m
pipeline.bench --peers`."""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.bench.__main__")

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from pipeline.bench.command import BenchArguments, Outcome, run_bench
from pipeline.bench.probes import cpu_s, machine, rss_bytes
from pipeline.bench.subjects import GPU_SUBJECTS, SUBJECTS, Setup, Subject
from pipeline.bench.turns import Figures, Turns
from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.console import say
from pipeline.dataset import open_dataset
from pipeline.decoders.tuning import Tuning, candidates, describe, write_tuning
from pipeline.errors import ConfigError
from pipeline.loader import Loader
from pipeline.options import (
    BatchSize,
    DaliDepth,
    LocalPath,
    Location,
    MarkdownFile,
    Parallel,
    Pixels,
    Rounds,
    Seconds,
    Share,
    TomlFile,
)
from pipeline.storage import redact

# What was decoded ahead before the clock starts would count as free.
_WARM_UP_BATCHES = 4
# Short, so that many rounds fit in: a busy minute of the machine then falls on all subjects.
_SECONDS_OF_TURN = 2.0


@dataclass(frozen=True)
class Arguments(BenchArguments):
    """Measure how fast a dataset is read and decoded, without a model.

    Order, boxes and flips are those of a training run. CPU time counts all threads of this process.
    With --json: images_per_s, cpu_ms_per_image, stages.
    """

    uri: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="URI")] = ""
    """Folder of the dataset: a path, s3://, gs:// or az://; or some of its shards, as a pattern in
    quotes such as 'data/train-*.tar' or 'data/train-{0000..0003}.tar', or a list with commas.
    Not with --peers."""
    decoder: Literal["auto", "dali", "turbo", "ffcv"] = "auto"
    """Decoder, as loader.decoder."""
    interpolation: Literal["bicubic", "bilinear", "area"] = "bicubic"
    """Resize filter, as in the view's settings."""
    output: Literal["uint8", "normalised"] = "uint8"
    """uint8: pixels as they leave the host of a GPU. normalised: float32, even if the CPU must
    compute it."""
    size: Pixels = 224
    """Height and width of the images in pixels."""
    batch_size: BatchSize = 64
    """Images per batch."""
    num_threads: Parallel = 0
    """Decoding threads. 0: as many as there are cores."""
    dali_depth: DaliDepth = 0
    """Batches in DALI's hands at once, as loader.dali_depth."""
    hw_decoder_load: Share = 0.0
    """Share of the JPEGs for a GPU's JPEG engine, as loader.hw_decoder_load."""
    seconds: Seconds | None = None
    """Length of the measurement (default 10); with --peers and --tune, of each turn (default 2)."""
    device: str = ""
    """Device that batches go to. Empty: cuda if there is one, otherwise cpu."""
    tune: bool = False
    """Try decoders, threads and, on a GPU, DALI's settings, and write the fastest as a tuning
    file."""
    tuning_file: TomlFile = Path("runs/tuned.toml")
    """--tune: the file to write; loader.tuning_file reads it."""
    peers: bool = False
    """Compare with other loaders on photographs that are made for it: torch, webdataset, DALI,
    FFCV, SPDL."""
    repeats: Rounds = 5
    """--peers, --tune: rounds."""
    folder: LocalPath = Path("runs/bench")
    """--peers: folder in which the photographs and datasets are made and kept (0.6 GB)."""
    report: MarkdownFile | None = None
    """--peers: Markdown file whose measured part is written anew, with a chart next to it."""


# ------------------------------------------------------------------------------ one loader


def measure(arguments: Arguments) -> dict[str, Any]:
    """Run the loader for some seconds and return what it did.

    Returns:
        images_per_s (wall), cpu_ms_per_image, first_batch_s (from the opened dataset to the first
        batch), rss_mib at the end and after one epoch (0 if the time was too short), and
        `stages`: items, busy_s, wait_s and bytes of each stage.

    Raises:
        ConfigError: The settings cannot work.
        DataError: The dataset cannot be read.
    """
    device = _device(arguments)
    seconds = 10.0
    if arguments.seconds is not None:
        seconds = arguments.seconds
    dataset = open_dataset(arguments.uri)
    num_samples = dataset.info.num_samples
    start_s = time.perf_counter()
    with _open_loader(arguments, dataset, device=device) as loader:
        batches = iter(loader)
        next(batches)
        first_batch_s = time.perf_counter() - start_s

        # What the loader decoded ahead while nobody asked would count as free.
        for _ in range(_WARM_UP_BATCHES):
            next(batches)

        before = loader.stats.snapshot()
        images = 0
        rss_epoch_bytes = 0
        start_cpu_s = cpu_s()
        start_s = time.perf_counter()
        while time.perf_counter() - start_s < seconds:
            batch = next(batches)
            images += batch.images_BCHW.shape[0]
            # Memory that grows with the epochs would show as a difference from the end's.
            if not rss_epoch_bytes and images >= num_samples:
                rss_epoch_bytes = rss_bytes()

        # Copies to a GPU are only queued when their batch is handed over.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall_s = time.perf_counter() - start_s
        used_cpu_s = cpu_s() - start_cpu_s
        after = loader.stats.snapshot()
        num_bad = loader.report.num_bad

    # Counters run from the loader's start: the warm-up's part is taken off.
    stages = {}
    for stage, counters in after.items():
        start = before[stage]
        stages[stage] = {name: value - start[name] for name, value in counters.items()}
    return {
        "images_per_s": images / wall_s,
        "cpu_ms_per_image": 1e3 * used_cpu_s / images,
        "first_batch_s": first_batch_s,
        "rss_mib": rss_bytes() / 2**20,
        "rss_after_one_epoch_mib": rss_epoch_bytes / 2**20,
        "epochs": images / num_samples,
        "num_images": images,
        "num_bad": num_bad,
        "device": str(device),
        "stages": stages,
    }


def _open_loader(arguments: Arguments, dataset: Any, *, device: torch.device) -> Loader:
    side = arguments.size
    view = ViewConfig(height=side, width=side, interpolation=arguments.interpolation)
    settings = LoaderConfig(
        decoder=arguments.decoder,
        num_threads=arguments.num_threads,
        dali_depth=arguments.dali_depth,
        hw_decoder_load=arguments.hw_decoder_load,
    )
    # One rank that has the machine to itself: figures of several would depend on each other.
    dtype = torch.float32
    if arguments.output == "uint8":
        dtype = torch.uint8
    return Loader(
        dataset,
        view,
        OrderConfig(),
        settings,
        seed=0,
        global_batch_size=arguments.batch_size,
        micro_batch_size=arguments.batch_size,
        device=device,
        dtype=dtype,
    )


def _device(arguments: Arguments) -> torch.device:
    if arguments.device:
        return torch.device(arguments.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def _measure_one(arguments: Arguments) -> Outcome:
    measured = measure(arguments)
    lines = [
        f"bench: {measured['images_per_s']:,.0f} images/s, "
        f"{measured['cpu_ms_per_image']:.3f} CPU-ms per image, first batch after "
        f"{measured['first_batch_s']:.2f} s, {measured['rss_mib']:,.0f} MiB after "
        f"{measured['epochs']:.1f} epochs"
    ]
    for stage, counters in measured["stages"].items():
        lines.append(
            f"  {stage:<7} busy {counters['busy_s']:7.2f} s, waited {counters['wait_s']:7.2f} s, "
            f"{counters['items']:,.0f} images, {counters['bytes'] / 1e6:,.1f} MB"
        )
    return Outcome(measured, "\n".join(lines))


# ------------------------------------------------------------------------------------ tune


def _tune(arguments: Arguments) -> Outcome:
    device = _device(arguments)
    found = candidates(device=device, interpolation=arguments.interpolation)
    ways = {describe(way): way for way in found}

    # A new loader for each turn: its threads and DALI's pipelines would disturb the others'.
    def measure_way(way: Tuning) -> Figures:
        seconds = arguments.seconds or _SECONDS_OF_TURN
        words = replace(arguments, **way.model_dump(), seconds=seconds)
        once = measure(words)
        return {"images_per_s": once["images_per_s"]}

    subjects = {}
    for name, way in ways.items():
        subjects[name] = partial(measure_way, way)
    turns = Turns("bench", rounds=arguments.repeats)
    for _ in turns.rounds():
        turns.take(subjects)

    rates = {}
    for name in ways:
        rates[name] = turns.spread(name, "images_per_s")
    ranked = sorted(ways, key=lambda name: rates[name].median, reverse=True)
    lines = []
    for name in ranked:
        rate = rates[name].text(",.0f")
        lines.append(f"{rate} images/s  {name}")
    # The file says how it came about: settings that were fastest for other pixels may not be here.
    how = (
        f"Written by python -m pipeline.bench --tune on {redact(arguments.uri)}: "
        f"{arguments.size} pixels, {arguments.interpolation}, batches of {arguments.batch_size}.\n"
        f"Fastest of {len(ways)}, {arguments.repeats} rounds, median (lowest-highest):\n"
    )
    best = ways[ranked[0]]
    comment = how + "\n".join(lines)
    write_tuning(arguments.tuning_file, best, device=device, comment=comment)
    lines.append(
        f"bench: wrote {arguments.tuning_file}; use it with --loader.tuning-file"
    )
    tried = []
    for name in ranked:
        rates_of_rounds = turns.values(name, "images_per_s")
        settings = ways[name].model_dump()
        tried.append({**settings, "rates": rates_of_rounds})
    data = {"best": best.model_dump(), "images_per_s": tried}
    return Outcome(data, "\n".join(lines))


# ----------------------------------------------------------------------------------- peers


def _compare_with_peers(arguments: Arguments) -> Outcome:
    # Only here: matplotlib takes a second to import, and the photographs need an extra.
    from pipeline.bench.peers import measure_peers
    from pipeline.bench.photos import make_sources
    from pipeline.bench.report import as_table, write_report

    folder = arguments.folder.resolve()
    say(f"bench: making photographs and datasets in {folder}, unless they are there")
    make_sources(folder)
    num_threads = arguments.num_threads or len(os.sched_getaffinity(0))
    device = _device(arguments).type
    about = {
        **machine(),
        "num_threads": num_threads,
        "batch_size": arguments.batch_size,
    }
    subjects: Sequence[Subject] = SUBJECTS
    if device == "cuda":
        subjects = GPU_SUBJECTS
    rows = measure_peers(
        Setup(folder, num_threads, arguments.batch_size, device),
        repeats=arguments.repeats,
        seconds=arguments.seconds or _SECONDS_OF_TURN,
        subjects=subjects,
    )
    subjects_json = [row.to_json() for row in rows]
    result = {"machine": about, "subjects": subjects_json}
    # Kept before the report is drawn: a chart that fails must not cost the measurement.
    text = json.dumps(result, indent=1)
    (folder / "peers.json").write_text(text + "\n")
    if arguments.report is not None:
        write_report(arguments.report, rows, about)
    return Outcome(result, as_table(rows))


def _run(arguments: Arguments) -> Outcome:
    has_dataset = bool(arguments.uri)
    does_both = arguments.peers and arguments.tune
    if has_dataset == arguments.peers or does_both:
        raise ConfigError(
            "bench: give either a dataset's URI, with or without --tune, or --peers."
        )
    counts = (arguments.batch_size, arguments.repeats)
    seconds_fit = arguments.seconds is None or arguments.seconds > 0
    if not seconds_fit or min(counts) < 1 or arguments.num_threads < 0:
        raise ConfigError(
            "bench: --seconds must be above 0, --batch-size and --repeats at least 1, "
            "--num-threads at least 0."
        )
    if arguments.peers:
        return _compare_with_peers(arguments)
    if arguments.tune:
        return _tune(arguments)
    return _measure_one(arguments)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_bench(Arguments, _run, module="pipeline.bench", args=args)
