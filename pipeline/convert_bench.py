"""Measure converting: `python -m pipeline.convert_bench`.

Every figure stands beside what plain tools do with the same images in the same run, in turns:
webdataset's ShardWriter fed by one process, `cp -r` and sha256sum, and a bare loop that decodes,
resizes and encodes.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.convert_bench")

import io
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import simplejpeg
from PIL import Image

from pipeline.bench.photos import make_crops
from pipeline.console import run_command, say, say_json
from pipeline.convert.workers import cores
from pipeline.errors import ConfigError
from pipeline.images.encode import shrunk_size

_SHARD_MB = 256
_SIDE = 256
_QUALITY = 90
_OURS = "pipeline.convert, pass-through"
_START = "pipeline.convert, one image"
_WEBDATASET = "webdataset ShardWriter, one process"
_WEBDATASET_START = "webdataset ShardWriter, one image"
_COPY = "cp -r, then sha256sum"
_RESIZE = f"pipeline.convert --resize {_SIDE}, one worker"
_RESIZE_START = f"pipeline.convert --resize {_SIDE}, one image"
_PILLOW = "Pillow: decode, bicubic, encode"
_TURBO = "simplejpeg and cv2 INTER_AREA: decode, resize, encode"
_SHARD_WRITER = """
import sys
from pathlib import Path
import webdataset as wds
root, target = Path(sys.argv[1]), sys.argv[2]
size = float(sys.argv[3])
with wds.ShardWriter(target + "/t-%06d.tar", maxsize=size, maxcount=10**9, verbose=0) as sink:
    for path in sorted(root.rglob("*.jpg")):
        about = {"filename": path.name}
        label, image = int(path.parent.name), path.read_bytes()
        sink.write({"__key__": path.stem, "jpg": image, "cls": label, "json": about})
"""


@dataclass
class Arguments:
    """Measure converting beside plain tools, in turns."""

    folder: Path = Path("runs/convert-bench")
    """Where images and shards go; removed images are made again."""
    images: int = 768
    """Different images, of about 90 kB."""
    copies: int = 32
    """Names that each has in the pass-through measurement."""
    runs: int = 5
    """Measurements of each, after one to warm up."""
    json: bool = False
    """Write the result to stdout as JSON."""


class _Measurements:
    """Wall and CPU seconds by what was measured."""

    def __init__(self) -> None:
        self.wall_s: dict[str, list[float]] = defaultdict(list)
        self.cpu_s: dict[str, list[float]] = defaultdict(list)

    def take(self, name: str, call: Callable[[], object]) -> None:
        """Measure one call; the CPU time of its processes is counted once they have ended."""
        start, start_s = os.times(), time.perf_counter()
        call()
        self.wall_s[name].append(time.perf_counter() - start_s)
        self.cpu_s[name].append(sum(os.times()[:4]) - sum(start[:4]))


class _Bench:
    def __init__(self, arguments: Arguments) -> None:
        self.folder = arguments.folder
        self.images = arguments.folder / f"images-{arguments.images}"
        self.many = arguments.folder / f"many-{arguments.images}x{arguments.copies}"
        self.one = arguments.folder / "one"
        self.out = arguments.folder / "out"
        if not self.images.exists():
            for number, data in enumerate(make_crops(arguments.images)):
                path = self.images / f"{number % 10}" / f"{number:05d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        paths = sorted(self.images.rglob("*.jpg"))
        self.data = [path.read_bytes() for path in paths]
        self.num_many = len(paths) * arguments.copies
        self.num_bytes = sum(map(len, self.data)) * arguments.copies
        if not self.many.exists():
            for path in paths:
                (self.many / path.parent.name).mkdir(parents=True, exist_ok=True)
                for copy in range(arguments.copies):
                    (self.many / path.parent.name / f"{copy:03d}_{path.name}").hardlink_to(path)
        (self.one / "0").mkdir(parents=True, exist_ok=True)
        (self.one / "0" / "a.jpg").write_bytes(self.data[0])

    def convert(self, source: Path, *options: str) -> None:
        command = [sys.executable, "-m", "pipeline.convert", str(source), str(self.out), *options]
        self._run([*command, "--shard-size", f"{_SHARD_MB}MB"])

    def shard_writer(self, source: Path) -> None:
        self.out.mkdir()
        self._run(
            [sys.executable, "-c", _SHARD_WRITER, str(source), str(self.out), f"{_SHARD_MB}e6"]
        )

    def copy(self) -> None:
        self._run(["cp", "-r", str(self.many), str(self.out)])
        # As many at a time as there are cores, for so many hash in a conversion.
        find = (
            f"find {self.out} -type f -print0 | xargs -0 -n 512 -P {cores()} sha256sum > /dev/null"
        )
        self._run(["bash", "-c", find])

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"convert_bench: {command[0:4]} failed: {done.stderr.strip()[-500:]}")

    def pillow(self) -> None:
        for data in self.data:
            with Image.open(io.BytesIO(data)) as image:
                size = shrunk_size(*image.size, short_side=_SIDE, long_side=None)
                image.resize(size, Image.Resampling.BICUBIC).save(
                    io.BytesIO(), "JPEG", quality=_QUALITY
                )

    def turbo(self) -> None:
        for data in self.data:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
            size = shrunk_size(pixels.shape[1], pixels.shape[0], short_side=_SIDE, long_side=None)
            small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            simplejpeg.encode_jpeg(small, quality=_QUALITY, colorsubsampling="420")

    def run(self, into: _Measurements, *, first: int) -> None:
        ways: list[tuple[str, Callable[[], object]]] = [
            (_OURS, lambda: self.convert(self.many)),
            (_WEBDATASET, lambda: self.shard_writer(self.many)),
            (_WEBDATASET_START, lambda: self.shard_writer(self.one)),
            (_COPY, self.copy),
            (_START, lambda: self.convert(self.one)),
            (_RESIZE, lambda: self.convert(self.images, "--resize", str(_SIDE), "--workers", "1")),
            (
                _RESIZE_START,
                lambda: self.convert(self.one, "--resize", str(_SIDE), "--workers", "1"),
            ),
            (_PILLOW, self.pillow),
            (_TURBO, self.turbo),
        ]
        for place in range(len(ways)):
            name, call = ways[(first + place) % len(ways)]
            shutil.rmtree(self.out, ignore_errors=True)
            os.sync()  # what was written for others is not waited for here
            into.take(name, call)
        shutil.rmtree(self.out, ignore_errors=True)


def measure(arguments: Arguments) -> dict[str, Any]:
    """Measure everything; return rows of seconds, and the ratios that matter."""
    bench, measured = _Bench(arguments), _Measurements()
    for run in range(arguments.runs + 1):
        say(
            f"convert_bench: run {run} of {arguments.runs}"
            + (" (to warm up, not counted)" if not run else "")
        )
        bench.run(measured if run else _Measurements(), first=run)
    wall = {name: median(values) for name, values in measured.wall_s.items()}
    cpu = {name: median(values) for name, values in measured.cpu_s.items()}
    counts = dict.fromkeys((_OURS, _WEBDATASET, _COPY), bench.num_many) | dict.fromkeys(
        (_START, _WEBDATASET_START, _RESIZE_START), 1
    )
    rows = [
        {
            "what": name,
            "images": (count := counts.get(name, arguments.images)),
            "median_s": wall[name],
            "min_s": min(measured.wall_s[name]),
            "max_s": max(measured.wall_s[name]),
            "images_per_s": count / wall[name],
            "cpu_ms_per_image": cpu[name] / count * 1e3,
        }
        for name in measured.wall_s
    ]
    resize_ms = (cpu[_RESIZE] - cpu[_RESIZE_START]) / (arguments.images - 1) * 1e3
    ratios = {
        "pass-through / ShardWriter, images a second, whole commands": wall[_WEBDATASET]
        / wall[_OURS],
        "the same, each without the time that one image takes": (
            wall[_WEBDATASET] - wall[_WEBDATASET_START]
        )
        / (wall[_OURS] - wall[_START]),
        "pass-through / cp -r and sha256sum, time": wall[_OURS] / wall[_COPY],
        "the same without the time that one image takes, time": (wall[_OURS] - wall[_START])
        / wall[_COPY],
        "resize / Pillow loop, CPU an image": resize_ms / (cpu[_PILLOW] / arguments.images * 1e3),
        "resize / simplejpeg and cv2 loop, CPU an image": resize_ms
        / (cpu[_TURBO] / arguments.images * 1e3),
        "resize, CPU ms an image": resize_ms,
    }
    return {
        "num_images": bench.num_many,
        "num_bytes": bench.num_bytes,
        "rows": rows,
        "ratios": ratios,
    }


def _run(arguments: Arguments) -> int:
    if min(arguments.images, arguments.copies, arguments.runs) < 1 or arguments.images < 2:
        raise ConfigError("convert_bench: --copies and --runs are at least 1, --images at least 2")
    result = measure(arguments)
    if arguments.json:
        say_json(result)
        return 0
    write = sys.stdout.write
    write(
        f"{result['num_images']:,} images, {result['num_bytes'] / 1e6:,.0f} MB; {arguments.runs} "
        "runs\n\n"
    )
    write(
        "| what | images | median s | min | max | images/s | CPU ms an image "
        "|\n|---|---|---|---|---|---|---|\n"
    )
    for row in result["rows"]:
        # A pool's workers are forked off a server, whose times the system does not count here.
        cpu = "not counted" if row["what"] == _OURS else f"{row['cpu_ms_per_image']:.3f}"
        write(
            f"| {row['what']} | {row['images']:,} | {row['median_s']:.2f} | {row['min_s']:.2f} | "
            f"{row['max_s']:.2f} | "
            f"{row['images_per_s']:,.0f} | {cpu} |\n"
        )
    write("\n| ratio | |\n|---|---|\n")
    for name, value in result["ratios"].items():
        write(f"| {name} | {value:.2f} |\n")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(
        _run,
        Arguments,
        args,
        module="pipeline.convert_bench",
        interrupted="convert_bench: stopped.",
    )
