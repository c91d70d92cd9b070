"""Measure converting: `python -m pipeline.convert_bench`.

Every figure stands next to what plain tools do with the same images in the same run, in turns:
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
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import simplejpeg
from PIL import Image

from pipeline.bench.command import BenchArguments, Outcome, report, run_bench
from pipeline.bench.photos import write_crops
from pipeline.bench.probes import run_counted
from pipeline.bench.turns import (
    Figures,
    Measure,
    Spread,
    Turns,
    divide_pairs,
    time_call,
)
from pipeline.convert.workers import cores
from pipeline.errors import ConfigError
from pipeline.images.encode import shrunk_size
from pipeline.options import LocalPath, Rounds

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


@dataclass(frozen=True)
class Arguments(BenchArguments):
    """Measure converting next to plain tools, in turns."""

    folder: LocalPath = Path("runs/convert-bench")
    """Folder of images and shards; removed images are made again."""
    images: Rounds = 768
    """Different images, of about 90 kB."""
    copies: Rounds = 32
    """Names that each has in the pass-through measurement."""
    runs: Rounds = 5
    """Rounds, after one to warm up."""


class _Work:
    """The images, and every way to convert them."""

    def __init__(self, arguments: Arguments) -> None:
        folder = arguments.folder
        self.images = folder / f"images-{arguments.images}"
        self.many = folder / f"many-{arguments.images}x{arguments.copies}"
        self.one = folder / "one"
        self.out = folder / "out"
        if not self.images.exists():
            write_crops(self.images, arguments.images)
        paths = sorted(self.images.rglob("*.jpg"))
        self.data = [path.read_bytes() for path in paths]
        self.num_many = len(paths) * arguments.copies
        bytes_once = 0
        for data in self.data:
            bytes_once += len(data)
        self.num_bytes = bytes_once * arguments.copies
        # Names of the same files: the disk holds the images once, and so does the page cache.
        if not self.many.exists():
            for path in paths:
                labelled = self.many / path.parent.name
                labelled.mkdir(parents=True, exist_ok=True)
                for copy in range(arguments.copies):
                    name = labelled / f"{copy:03d}_{path.name}"
                    name.hardlink_to(path)
        # What a command costs before its first image: it is taken off in the ratios.
        class_folder = self.one / "0"
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / "a.jpg").write_bytes(self.data[0])

    def subjects(self) -> dict[str, Measure]:
        """Return every way by its name."""
        # One worker: the loops beside it use one core, and CPU per image is what compares.
        resize = ("--resize", str(_SIDE), "--workers", "1")
        ways: dict[str, Measure] = {
            _OURS: partial(self._convert, self.many),
            _WEBDATASET: partial(self._shard_writer, self.many),
            _WEBDATASET_START: partial(self._shard_writer, self.one),
            _COPY: self._copy,
            _START: partial(self._convert, self.one),
            _RESIZE: partial(self._convert, self.images, *resize),
            _RESIZE_START: partial(self._convert, self.one, *resize),
            _PILLOW: partial(time_call, self._pillow),
            _TURBO: partial(time_call, self._turbo),
        }
        from_clean: dict[str, Measure] = {}
        for name, way in ways.items():
            from_clean[name] = partial(self._from_clean, way)
        return from_clean

    def count(self, subject: str) -> int:
        """Return how many images a subject converts in a turn."""
        if subject in (_OURS, _WEBDATASET, _COPY):
            return self.num_many
        if subject in (_START, _WEBDATASET_START, _RESIZE_START):
            return 1
        return len(self.data)

    def _from_clean(self, way: Measure) -> Figures:
        shutil.rmtree(self.out, ignore_errors=True)
        # What was written for others is not waited for in this turn.
        os.sync()
        figures = way()
        shutil.rmtree(self.out, ignore_errors=True)
        return figures

    def _convert(self, source: Path, *options: str) -> Figures:
        command = [sys.executable, "-m", "pipeline.convert", str(source), str(self.out)]
        command += options
        command += ["--shard-size", f"{_SHARD_MB}MB"]
        return run_counted(command)

    def _shard_writer(self, source: Path) -> Figures:
        # ShardWriter does not make its folder.
        self.out.mkdir()
        words = (str(source), str(self.out), f"{_SHARD_MB}e6")
        command = [sys.executable, "-c", _SHARD_WRITER, *words]
        return run_counted(command)

    def _copy(self) -> Figures:
        # As many sums at a time as there are cores, for so many hash in a conversion.
        hash_all = f"xargs -0 -n 512 -P {cores()} sha256sum > /dev/null"
        script = f'cp -r "$0" "$1" && find "$1" -type f -print0 | {hash_all}'
        command = ["bash", "-c", script, str(self.many), str(self.out)]
        return run_counted(command)

    def _pillow(self) -> None:
        for data in self.data:
            file = io.BytesIO(data)
            with Image.open(file) as image:
                size = shrunk_size(*image.size, short_side=_SIDE, long_side=None)
                small = image.resize(size, Image.Resampling.BICUBIC)
                encoded = io.BytesIO()
                small.save(encoded, "JPEG", quality=_QUALITY)

    def _turbo(self) -> None:
        for data in self.data:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
            height, width, _ = pixels.shape
            size = shrunk_size(width, height, short_side=_SIDE, long_side=None)
            small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            simplejpeg.encode_jpeg(small, quality=_QUALITY, colorsubsampling="420")


def measure(arguments: Arguments) -> Outcome:
    """Measure everything; give seconds, rates and the ratios that matter."""
    work = _Work(arguments)
    turns = Turns("convert_bench", rounds=arguments.runs, warm_up_rounds=1)
    subjects = work.subjects()
    for _ in turns.rounds():
        turns.take(subjects)
    rows = []
    for name in turns.subjects:
        count = work.count(name)
        time = turns.spread(name, "wall_s")
        cpu = turns.spread(name, "cpu_s")
        row = {
            "what": name,
            "images": count,
            "median_s": time,
            "images_per_s": count / time.median,
            "cpu_ms_per_image": 1e3 * cpu.median / count,
        }
        rows.append(row)
    facts = {"num_images": work.num_many, "num_bytes": work.num_bytes}
    ratios = _ratios(turns, num_images=arguments.images)
    return report(rows, ratios=ratios, facts=facts)


def _ratios(turns: Turns, *, num_images: int) -> dict[str, Spread]:
    """Return the ratios that matter, round by round."""

    def without(subject: str, start: str, figure: str) -> list[float]:
        whole = turns.values(subject, figure)
        starts = turns.values(start, figure)
        pairs = zip(whole, starts, strict=True)
        return [value - start_value for value, start_value in pairs]

    # With the start and without it: a short conversion pays it, a long one does not notice.
    ours_s = without(_OURS, _START, "wall_s")
    webdataset_s = without(_WEBDATASET, _WEBDATASET_START, "wall_s")
    # One image is part of the start that is taken off, and must not be counted twice.
    resize_cpu_s = without(_RESIZE, _RESIZE_START, "cpu_s")
    num_timed = num_images - 1
    resize_ms = [1e3 * value / num_timed for value in resize_cpu_s]
    pillow_cpu_s = turns.values(_PILLOW, "cpu_s")
    turbo_cpu_s = turns.values(_TURBO, "cpu_s")
    pillow_ms = [1e3 * value / num_images for value in pillow_cpu_s]
    turbo_ms = [1e3 * value / num_images for value in turbo_cpu_s]
    # Of rates the other's time stands above ours, so that more than 1 is faster.
    whole_rate = turns.ratio(_WEBDATASET, _OURS, "wall_s")
    rate_after_start = divide_pairs(webdataset_s, ours_s)
    copy_s = turns.values(_COPY, "wall_s")
    whole_cpu = turns.ratio(_OURS, _WEBDATASET, "cpu_s")
    copy_time = turns.ratio(_OURS, _COPY, "wall_s")
    copy_time_after_start = divide_pairs(ours_s, copy_s)
    to_pillow = divide_pairs(resize_ms, pillow_ms)
    to_turbo = divide_pairs(resize_ms, turbo_ms)
    return {
        "pass-through / ShardWriter, images a second, whole commands": whole_rate,
        "the same, each without the time that one image takes": rate_after_start,
        "pass-through / ShardWriter, CPU, whole commands": whole_cpu,
        "pass-through / cp -r and sha256sum, time": copy_time,
        "the same without the time that one image takes, time": copy_time_after_start,
        "resize / Pillow loop, CPU per image": to_pillow,
        "resize / simplejpeg and cv2 loop, CPU per image": to_turbo,
        "resize, CPU-ms per image": Spread.of(resize_ms),
    }


def _run(arguments: Arguments) -> Outcome:
    fewest = min(arguments.images, arguments.copies, arguments.runs)
    if fewest < 1 or arguments.images < 2:
        raise ConfigError(
            "convert_bench: --copies and --runs are at least 1, --images at least 2"
        )
    return measure(arguments)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_bench(Arguments, _run, module="pipeline.convert_bench", args=args)
