"""The whole way in minutes: `python -m train.demo [--src FOLDER] [--uri URI] [--run-dir
runs/demo]`.

Pictures become shards, a small model is trained by the real commands, stopped on purpose and
resumed, measured on held-out pictures and exported. Every command is printed as one would type it.
Run again, it goes on where it was.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.demo.__main__")

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console import run_command, say, say_json
from pipeline.errors import ConfigError
from pipeline.storage import join
from train.demo.launching import (
    Interrupted,
    StageFailed,
    deepspeed_command,
    environment,
    run_stage,
    run_training,
)
from train.demo.pictures import Pictures, cut_photos, split_folder
from train.process.outcome import read_status
from train.recipes import DEMO_MINUTES, RECIPES
from train.report.meter import summary_table
from train.report.metrics_file import LOSS_PICTURE, RECONSTRUCTION_PICTURE, SUMMARY_FILE

STOPPED_EARLY = 75
MAX_RANKS = 8
SAMPLES_PER_SHARD = 256
"""Several shards even of the small default pictures, so that every part of the data path is
used."""
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Arguments:
    """Convert pictures, train a small masked autoencoder, stop and resume it, measure and export
    it."""

    src: str = ""
    """Folder of your own pictures, flat or in class folders. Empty: photographs of scikit-image and
    scikit-learn."""
    uri: str = ""
    """Where shards and checkpoints are kept, such as s3://bucket/prefix. Empty: in the run's
    folder."""
    run_dir: str = "runs/demo"
    """Local folder for metrics, pictures and exports."""
    minutes: float = DEMO_MINUTES
    """About how long to train, in minutes on two CPU cores; sets the number of steps."""
    ranks: int = 0
    """Processes to train with. 0: one a GPU, or one a CPU core up to 8."""
    json: bool = False
    """Write the result to stdout as JSON: run_dir, evaluation, summary."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        _run,
        Arguments,
        argv,
        module="train.demo",
        interrupted="demo: stopped. The same command goes on from here.",
    )


def _run(arguments: Arguments) -> int:
    demo = _Demo(arguments)
    try:
        demo.run()
    except StageFailed as failure:
        say(f"\nthe demo stopped at: {failure.stage} (exit code {failure.exit_code})")
        return failure.exit_code
    except Interrupted:
        # Not 130: the training that ran has saved its state.
        say("\ninterrupted: the same command goes on from here")
        return STOPPED_EARLY
    if arguments.json:
        say_json(demo.results())
    return 0


class _Demo:
    """The stages, in order."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.run_dir = Path(arguments.run_dir)
        self.home = arguments.uri or str(self.run_dir / "data")
        self.checkpoints = (
            join(arguments.uri, "checkpoints")
            if arguments.uri
            else str(self.run_dir / "checkpoints")
        )
        recipe = RECIPES["demo"]
        self.steps = max(2, round(recipe["train"]["steps"] * arguments.minutes / DEMO_MINUTES))
        self.image_size = int(recipe["model"]["image_size"])
        self.ranks = arguments.ranks or count_ranks()
        batch = int(recipe["train"]["global_batch_size"])
        if batch % self.ranks:
            raise ConfigError(
                f"--ranks {self.ranks} does not divide the demo's batch of {batch}: use 1, 2, 4 or "
                "8"
            )
        self.precision = ""
        self.micro_batch_size = min(int(recipe["train"]["micro_batch_size"]), batch // self.ranks)

    def run(self) -> None:
        """Go through all stages."""
        self._say_stage(1, "pictures")
        pictures = self._pictures()
        self._say_stage(2, "pictures into shards")
        self._convert(pictures)
        self._say_stage(
            3,
            f"training: {self.steps} steps on {self.ranks} processes, stopped on purpose half-way",
        )
        self._train()
        self._say_stage(4, "measuring on held-out pictures")
        evaluation = str(self.run_dir / EVALUATION_FILE)
        run_stage(
            "evaluation",
            [sys.executable, "-m", "train.evaluate", self.checkpoints, "--out", evaluation],
        )
        self._say_stage(5, "the encoder for timm")
        out = str(self.run_dir / "export")
        run_stage(
            "export",
            [sys.executable, "-m", "train.export", self.checkpoints, "--to", "timm", "--out", out],
        )
        self._close()

    def _say_stage(self, number: int, what: str) -> None:
        sys.stdout.write(f"\n== {number}/5 {what}\n")
        sys.stdout.flush()

    def _pictures(self) -> Pictures:
        folder = self.run_dir / "pictures"
        source = self.arguments.src
        pictures = split_folder(Path(source), folder) if source else cut_photos(folder)
        labels = f"{pictures.num_classes} classes" if pictures.num_classes else "no labels"
        sys.stdout.write(
            f"{pictures.num_train:,} pictures to train on, {pictures.num_val:,} held out, "
            f"{labels}, in {folder}\n"
        )
        if not source:
            sys.stdout.write(
                "The class of a crop is its photograph; held-out crops are from its other half. A "
                "labelled toy: it "
                "shows that the pipeline learns, not that it generalises.\n"
            )
        return pictures

    def _convert(self, pictures: Pictures) -> None:
        for half, folder in (("train", pictures.train), ("val", pictures.val)):
            command = [sys.executable, "-m", "pipeline.convert", str(folder), join(self.home, half)]
            command += ["--samples-per-shard", str(SAMPLES_PER_SHARD), "--split", half]
            if self.arguments.src:
                command += ["--resize", str(2 * self.image_size)]
            run_stage(f"conversion of the {half} pictures", command)

    def _train(self) -> None:
        """Launch until half-way, stop as a scheduler would, and launch the same command again."""
        self.precision = choose_precision()
        stop_at = self.steps // 2
        before = read_status(self.run_dir).get("step", 0)
        if before < stop_at:
            self._launch(stop_at=stop_at)
            status = read_status(self.run_dir)
            if status.get("state") == "preempted":
                sys.stdout.write(
                    f"\nstopped on purpose at step {status['step']} (SIGTERM, as a scheduler "
                    "would). "
                    "The same command again:\n"
                )
        elif before < self.steps:
            sys.stdout.write(f"an earlier start got to step {before}: it is resumed\n")
        if read_status(self.run_dir).get("state") != "done" or before >= stop_at:
            self._launch(stop_at=None)

    def _launch(self, *, stop_at: int | None) -> None:
        settings = {
            "data.train": join(self.home, "train"),
            "data.val": join(self.home, "val"),
            "run.dir": str(self.run_dir),
            "checkpoint.dir": self.checkpoints,
            "train.steps": str(self.steps),
            "optim.warmup-steps": str(max(1, self.steps // 10)),
            "train.micro-batch-size": str(self.micro_batch_size),
            "engine.precision": self.precision,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        command = deepspeed_command("demo", words, ranks=self.ranks)
        run_training(
            command,
            run_dir=self.run_dir,
            stop_at=stop_at,
            env=environment(ranks=self.ranks, has_gpu=count_gpus() > 0),
        )

    def results(self) -> dict[str, Any]:
        """Give what came out, once all stages are done."""
        return {
            "run_dir": str(self.run_dir),
            "evaluation": _read_json(self.run_dir / EVALUATION_FILE),
            "summary": _read_json(self.run_dir / SUMMARY_FILE),
        }

    def _close(self) -> None:
        """Say what came out, and where it is."""
        results = self.results()
        evaluation, summary = results["evaluation"], results["summary"]
        lines = ["", "== what came out", summary_table(summary), ""]
        lines += [
            "held-out loss on masked pixels:",
            f"  mean colour {evaluation['mean_colour_loss']:.4f}   nearby colours "
            f"{evaluation['nearby_colours_loss']:.4f}   the model {evaluation['model_loss']:.4f}",
        ]
        if "knn" in evaluation:
            knn = evaluation["knn"]
            lines.append(
                f"nearest neighbours in frozen features, {knn['num_classes']} classes: "
                f"untrained {100 * knn['untrained']:.1f}%, trained {100 * knn['trained']:.1f}%"
            )
        names = (
            RECONSTRUCTION_PICTURE,
            LOSS_PICTURE,
            "metrics.jsonl",
            SUMMARY_FILE,
            EVALUATION_FILE,
            "export",
        )
        lines += [
            "",
            "look at:",
            *(f"  {self.run_dir / name}" for name in names),
            f"  {self.checkpoints}",
        ]
        sys.stdout.write("\n".join(lines) + "\n")


def count_ranks() -> int:
    """Choose how many processes to train with: one a GPU, or a power of two up to the cores this
    process may use."""
    available = count_gpus() or len(os.sched_getaffinity(0))
    ranks = 1
    while ranks * 2 <= min(available, MAX_RANKS):
        ranks *= 2
    return ranks


def choose_precision() -> str:
    """Choose the faster of bf16 and fp32 matrix products on this machine.

    On a GPU that is bf16. CPUs differ: with AVX512-BF16 or AMX bf16 is up to twice as fast, without
    them many times slower, so a product of the demo's size is timed both ways.
    """
    import torch

    if torch.cuda.is_available():
        return "bf16"

    def seconds(dtype: torch.dtype) -> float:
        # Tokens of a micro-batch, width, and width of the hidden layer.
        left, right = torch.ones(1024, 192, dtype=dtype), torch.ones(192, 768, dtype=dtype)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        return min(times)

    fp32_s, bf16_s = seconds(torch.float32), seconds(torch.bfloat16)
    chosen = "autocast" if bf16_s < fp32_s else "fp32"
    sys.stdout.write(
        f"bf16 products take {bf16_s / fp32_s:.2f}x the time of fp32 here: engine.precision "
        f"{chosen}\n"
    )
    return chosen


def count_gpus() -> int:
    """Count the GPUs this process sees."""
    import torch

    return torch.cuda.device_count()


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
