"""Loader-only throughput: `python -m pipeline.bench URI`; beside other loaders: `python -m
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
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import psutil
import torch
import tyro

from pipeline.bench.subjects import GPU_SUBJECTS, SUBJECTS, Setup
from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.console import run_command, say, say_json
from pipeline.dataset import open_dataset
from pipeline.decoders.tuning import Tuning, candidates, describe, write_tuning
from pipeline.errors import ConfigError
from pipeline.loader import Loader
from pipeline.storage import redact

_WARM_UP_BATCHES = 4


@dataclass(frozen=True)
class Arguments:
    """Measure how fast a dataset is read and decoded, without a model.

    Order, boxes and flips are those of a training run. CPU time counts all threads of this process.
    """

    uri: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URI")] = ""
    """Folder of the dataset: a path, s3://, gs:// or az://. Not with --peers."""
    decoder: Literal["auto", "dali", "turbo", "ffcv"] = "auto"
    """Decoder, as loader.decoder."""
    interpolation: Literal["bicubic", "bilinear", "area"] = "bicubic"
    """Resize filter, as in the view's settings."""
    output: Literal["uint8", "normalised"] = "uint8"
    """uint8: pixels as they leave the host of a GPU. normalised: float32, also where the CPU must
    compute it."""
    size: int = 224
    """Height and width of the images in pixels."""
    batch_size: int = 64
    """Images of a batch."""
    num_threads: int = 0
    """Decoding threads. 0: as many as there are cores."""
    dali_depth: int = 0
    """Batches in DALI's hands at once, as loader.dali_depth."""
    hw_decoder_load: float = 0.0
    """Share of the JPEGs for a GPU's JPEG engine, as loader.hw_decoder_load."""
    seconds: float = 10.0
    """Length of the measurement; with --peers and --tune, of each of its repeats (2 where not
    given)."""
    device: str = ""
    """Where batches are wanted. Empty: cuda where there is one, cpu otherwise."""
    tune: bool = False
    """Try decoders, threads and, on a GPU, DALI's settings, and write the fastest as a tuning
    file."""
    tuning_file: Path = Path("runs/tuned.toml")
    """--tune: where to; what loader.tuning_file reads."""
    peers: bool = False
    """Compare with other loaders on photographs that are made for it: torch, webdataset, DALI,
    FFCV, SPDL."""
    repeats: int = 5
    """--peers, --tune: rounds."""
    folder: Path = Path("runs/bench")
    """--peers: where the photographs and datasets are made and kept (0.6 GB)."""
    report: Path | None = None
    """--peers: Markdown file whose measured part is written anew, with a chart beside it."""
    json: bool = False
    """Write the result to stdout as JSON: images_per_s, cpu_ms_per_image, stages."""


def measure(arguments: Arguments) -> dict[str, Any]:
    """Run the loader for some seconds and return what it did.

    Returns:
        images_per_s (wall), cpu_ms_per_image, first_batch_s (from the opened dataset to the first
        batch), rss_mib at the end and after one epoch (0 where the time was too short), and
        `stages`: items, busy_s, wait_s and bytes of each stage.

    Raises:
        ConfigError: The settings cannot work.
        DataError: The dataset cannot be read.
    """
    device = _device(arguments)
    dataset = open_dataset(arguments.uri)
    start_s = time.perf_counter()
    with Loader(
        dataset,
        ViewConfig(
            height=arguments.size, width=arguments.size, interpolation=arguments.interpolation
        ),
        OrderConfig(),
        LoaderConfig(
            decoder=arguments.decoder,
            num_threads=arguments.num_threads,
            dali_depth=arguments.dali_depth,
            hw_decoder_load=arguments.hw_decoder_load,
        ),
        seed=0,
        global_batch_size=arguments.batch_size,
        micro_batch_size=arguments.batch_size,
        device=device,
        dtype=torch.uint8 if arguments.output == "uint8" else torch.float32,
    ) as loader:
        batches = iter(loader)
        next(batches)
        first_batch_s = time.perf_counter() - start_s
        for _ in range(_WARM_UP_BATCHES):
            next(batches)
        before = loader.stats.snapshot()
        cpu_s, start_s, images = time.process_time(), time.perf_counter(), 0
        rss_epoch_bytes = 0
        while time.perf_counter() - start_s < arguments.seconds:
            images += next(batches).images_BCHW.shape[0]
            if not rss_epoch_bytes and images >= dataset.info.num_samples:
                rss_epoch_bytes = psutil.Process().memory_info().rss
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        after = loader.stats.snapshot()
        num_bad = loader.report.num_bad
    stages = {
        stage: {name: value - before[stage][name] for name, value in counters.items()}
        for stage, counters in after.items()
    }
    return {
        "images_per_s": images / wall_s,
        "cpu_ms_per_image": 1e3 * cpu_s / images,
        "first_batch_s": first_batch_s,
        "rss_mib": psutil.Process().memory_info().rss / 2**20,
        "rss_after_one_epoch_mib": rss_epoch_bytes / 2**20,
        "epochs": images / dataset.info.num_samples,
        "num_images": images,
        "num_bad": num_bad,
        "device": str(device),
        "stages": stages,
    }


def _device(arguments: Arguments) -> torch.device:
    return torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _seconds_of_repeat(arguments: Arguments) -> float:
    return arguments.seconds if arguments.seconds != Arguments.seconds else 2.0


def _run_tune(arguments: Arguments) -> int:
    device = _device(arguments)
    ways = candidates(device=device, interpolation=arguments.interpolation)
    rates: dict[Tuning, list[float]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        for way in ways:
            once = replace(arguments, **way.model_dump(), seconds=_seconds_of_repeat(arguments))
            rates[way].append(measure(once)["images_per_s"])
        say(f"bench: round {repeat + 1} of {arguments.repeats}")
    ranked = sorted(ways, key=lambda way: median(rates[way]), reverse=True)
    lines = [
        f"{median(rates[way]):>9,.0f} images/s ({min(rates[way]):,.0f}-{max(rates[way]):,.0f})  "
        f"{describe(way)}"
        for way in ranked
    ]
    how = (
        f"Written by python -m pipeline.bench --tune on {redact(arguments.uri)}: {arguments.size} "
        "pixels, "
        f"{arguments.interpolation}, batches of {arguments.batch_size}.\nFastest of {len(ways)}, "
        f"{arguments.repeats} rounds each, median (lowest-highest):\n"
    )
    write_tuning(arguments.tuning_file, ranked[0], device=device, comment=how + "\n".join(lines))
    if arguments.json:
        say_json(
            {
                "best": ranked[0].model_dump(),
                "images_per_s": [{**way.model_dump(), "rates": rates[way]} for way in ranked],
            }
        )
    else:
        say(
            "\n".join(lines)
            + f"\nbench: wrote {arguments.tuning_file}; use it with --loader.tuning-file"
        )
    return 0


def _say_measured(found: dict[str, Any]) -> None:
    say(
        f"bench: {found['images_per_s']:,.0f} images/s, {found['cpu_ms_per_image']:.3f} CPU-ms an "
        "image, first batch "
        f"after {found['first_batch_s']:.2f} s, {found['rss_mib']:,.0f} MiB after "
        f"{found['epochs']:.1f} epochs"
    )
    for stage, counters in found["stages"].items():
        say(
            f"  {stage:<7} busy {counters['busy_s']:7.2f} s, waited {counters['wait_s']:7.2f} s, "
            f"{counters['items']:,.0f} images, {counters['bytes'] / 1e6:,.1f} MB"
        )


def _run_peers(arguments: Arguments) -> int:
    # matplotlib and the peers are imported where they are used.
    from pipeline.bench.peers import machine, measure_peers
    from pipeline.bench.photos import make_sources
    from pipeline.bench.report import as_table, write_report

    folder = arguments.folder.resolve()
    make_sources(folder)
    num_threads = arguments.num_threads or len(os.sched_getaffinity(0))
    device = _device(arguments).type
    about = {**machine(), "num_threads": num_threads, "batch_size": arguments.batch_size}
    found = measure_peers(
        Setup(folder, num_threads, arguments.batch_size, device),
        repeats=arguments.repeats,
        seconds=_seconds_of_repeat(arguments),
        subjects=GPU_SUBJECTS if device == "cuda" else SUBJECTS,
    )
    result = {"machine": about, "subjects": [subject.to_json() for subject in found]}
    (folder / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    if arguments.report is not None:
        write_report(arguments.report, found, about)
    if arguments.json:
        say_json(result)
    else:
        say(as_table(found))
    return 0


def _run(arguments: Arguments) -> int:
    if bool(arguments.uri) == arguments.peers or (arguments.peers and arguments.tune):
        raise ConfigError("bench: give either a dataset's URI, with or without --tune, or --peers.")
    if (
        arguments.seconds <= 0
        or arguments.batch_size < 1
        or arguments.repeats < 1
        or arguments.num_threads < 0
    ):
        raise ConfigError(
            "bench: --seconds must be above 0, --batch-size and --repeats 1 or more, --num-threads "
            "0 up."
        )
    if arguments.peers:
        return _run_peers(arguments)
    if arguments.tune:
        return _run_tune(arguments)
    found = measure(arguments)
    if arguments.json:
        say_json(found)
    else:
        _say_measured(found)
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(
        _run,
        Arguments,
        args,
        module="pipeline.bench",
        interrupted="bench: stopped.",
    )
