"""The stages of the demo, in order."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console import say_json
from pipeline.errors import ConfigError
from pipeline.options import CountOrOff, LocalText, Location, Minutes, Parallel
from pipeline.storage import join
from train.demo.launching import (
    deepspeed_command,
    environment,
    raise_interrupts,
    run_stage,
    run_training,
)
from train.demo.machine import Machine
from train.demo.pictures import Pictures, cut_photos, split_folder
from train.demo.plan import (
    Asked,
    Plan,
    choose_plan,
    describe_kept,
    explain,
    keep_plan,
    kept_plan,
)
from train.process.outcome import read_status
from train.recipes import RECIPES
from train.report.meter import summary_table
from train.report.metrics_file import LOSS_PICTURE, RECONSTRUCTION_PICTURE, SUMMARY_FILE

NUM_STAGES = 6
SAMPLES_PER_SHARD = 256
"""Several shards even of the small default pictures, so that every part of the data path is
used."""
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Arguments:
    """Convert pictures, train a small masked autoencoder, stop and resume it, measure and export
    it."""

    src: Location = ""
    """Folder of your own pictures, flat or in class folders. Empty: photographs of scikit-image and
    scikit-learn."""
    uri: Location = ""
    """Where shards and checkpoints are kept, for example s3://bucket/prefix. Empty: in the run's
    folder."""
    run_dir: LocalText = "runs/demo"
    """Local folder for metrics, pictures and exports."""
    steps: CountOrOff = 0
    """Optimizer steps. 0: what `--minutes` says, or 800, or fewer if this machine does not manage
    them in about four minutes. A run keeps its number."""
    minutes: Minutes = 0.0
    """About how long to train, in minutes; the machine's speed is measured. 0: as for --steps."""
    ranks: Parallel = 0
    """Processes to train with. 0: one per GPU, or one per CPU core, up to 8."""
    json: bool = False
    """Write the result to stdout as JSON: run_dir, evaluation, summary."""


def run_demo(arguments: Arguments) -> int:
    """Go through all stages.

    Args:
        arguments: the command line.

    Returns:
        0.

    Raises:
        MaelstromError: an option cannot work, or a stage failed.
        KeyboardInterrupt: the user stopped it; no process is left behind.
    """
    check_arguments(arguments)
    raise_interrupts()
    demo = Demo(arguments)
    demo.run()
    if arguments.json:
        say_json(demo.results())
    return 0


def check_arguments(arguments: Arguments) -> None:
    """Refuse options that cannot work, before anything is made.

    Raises:
        ConfigError: naming the option.
    """
    batch = int(RECIPES["demo"]["train"]["global_batch_size"])
    divides = arguments.ranks == 0 or batch % arguments.ranks == 0
    if arguments.ranks < 0 or not divides:
        raise ConfigError(
            f"--ranks {arguments.ranks} does not divide the demo's batch of {batch}: use 1, 2, 4 "
            "or 8"
        )
    if arguments.steps and arguments.minutes:
        raise ConfigError(
            "--steps and --minutes both say how long to train: give one of them"
        )
    if arguments.steps < 0 or arguments.minutes < 0:
        raise ConfigError(
            "--steps and --minutes must be at least 0; 0 leaves the choice to us"
        )
    if arguments.steps == 1:
        raise ConfigError(
            "--steps 1: at least 2, for the demo stops half-way on purpose"
        )


class Demo:
    """Runs the stages.

    Args:
        arguments: checked.
    """

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._run_dir = Path(arguments.run_dir)
        self._data = arguments.uri or str(self._run_dir / "data")
        checkpoints_in = arguments.uri or str(self._run_dir)
        self._checkpoints = join(checkpoints_in, "checkpoints")
        # Known once the machine was looked at.
        self._ranks = 0
        self._has_gpu = False

    def run(self) -> None:
        """Go through all stages."""
        self._say_stage(1, "pictures")
        pictures = self._prepare_pictures()
        self._say_stage(2, "how fast this machine is")
        plan = self._look_at_machine(pictures)
        self._say_stage(3, "pictures into shards")
        self._convert(pictures)
        self._say_stage(
            4,
            f"training: {plan.steps} steps on {self._ranks} processes, stopped on purpose half-way",
        )
        self._train(plan)
        self._say_stage(5, "measuring on held-out pictures")
        self._evaluate(plan)
        self._say_stage(6, "the encoder for timm")
        self._export()
        self._close()

    def _say_stage(self, number: int, what: str) -> None:
        _say(f"\n== {number}/{NUM_STAGES} {what}")

    def _prepare_pictures(self) -> Pictures:
        folder = self._run_dir / "pictures"
        source = self._arguments.src
        if source:
            pictures = split_folder(Path(source), folder)
        else:
            pictures = cut_photos(folder)
        labels = "no labels"
        if pictures.num_classes:
            labels = f"{pictures.num_classes} classes"
        _say(
            f"{pictures.num_train:,} pictures to train on, {pictures.num_val:,} held out, "
            f"{labels}, in {folder}"
        )
        if not source:
            _say(
                "The class of a crop is its photograph; held-out crops are from its other half. A "
                "labelled toy: it shows that the pipeline learns, not that it generalises."
            )
        return pictures

    def _look_at_machine(self, pictures: Pictures) -> Plan:
        """Choose how long to train and measure, or find what an earlier start has chosen."""
        asked = Asked(steps=self._arguments.steps, minutes=self._arguments.minutes)
        plan = kept_plan(self._run_dir, asked)
        with Machine(ranks=self._arguments.ranks) as machine:
            found = machine.look()
            self._ranks = machine.ranks(found)
            self._has_gpu = found.gpus > 0
            if plan is not None:
                _say(describe_kept(plan, self._run_dir))
                # Again, because it may come from the settings of a run without a plan's file.
                keep_plan(self._run_dir, plan)
                return plan
            batch = int(RECIPES["demo"]["train"]["global_batch_size"])
            speed = machine.time(found, global_batch_size=batch)
        plan = choose_plan(asked, found, speed, pictures)
        _say(explain(plan, found, speed, pictures))
        keep_plan(self._run_dir, plan)
        return plan

    def _convert(self, pictures: Pictures) -> None:
        options = ["--samples-per-shard", str(SAMPLES_PER_SHARD)]
        if self._arguments.src:
            image_size = int(RECIPES["demo"]["model"]["image_size"])
            # Twice the input: random crops then show detail that the whole picture lacks.
            options += ["--resize", str(2 * image_size)]
        for split, folder in (("train", pictures.train), ("val", pictures.val)):
            shards = join(self._data, split)
            # This Python, not the first on the PATH, which may lack the project.
            command = [sys.executable, "-m", "pipeline.convert", str(folder), shards]
            command += [*options, "--split", split]
            run_stage(f"conversion of the {split} pictures", command)

    def _train(self, plan: Plan) -> None:
        """Launch until half-way, stop as a scheduler would, and launch the same command again."""
        stop_at = plan.steps // 2
        before = read_status(self._run_dir).get("step", 0)
        if before < stop_at:
            self._launch(plan, stop_at=stop_at)
            status = read_status(self._run_dir)
            if status.get("state") == "preempted":
                _say(
                    f"\nstopped on purpose at step {status['step']} (SIGTERM, as a scheduler "
                    "would). The same command again:"
                )
        elif before < plan.steps:
            _say(f"an earlier start got to step {before}: it is resumed")
        # A tiny run may have finished before it was told to stop. One that an earlier start
        # finished is launched all the same: it says so.
        state = read_status(self._run_dir).get("state")
        if state != "done" or before >= stop_at:
            self._launch(plan, stop_at=None)

    def _launch(self, plan: Plan, *, stop_at: int | None) -> None:
        recipe = RECIPES["demo"]["train"]
        batch = int(recipe["global_batch_size"])
        micro_batch_size = int(recipe["micro_batch_size"])
        # The same words at every start: a resume with other settings would be refused.
        settings = {
            "data.train": join(self._data, "train"),
            "data.val": join(self._data, "val"),
            "run.dir": str(self._run_dir),
            "checkpoint.dir": self._checkpoints,
            "train.steps": str(plan.steps),
            "optim.warmup-steps": str(max(1, plan.steps // 10)),
            "train.micro-batch-size": str(min(micro_batch_size, batch // self._ranks)),
            "engine.precision": plan.precision,
        }
        words = []
        for name, value in settings.items():
            words += [f"--{name}", value]
        command = deepspeed_command("demo", words, ranks=self._ranks)
        env = environment(ranks=self._ranks, has_gpu=self._has_gpu)
        run_training(command, run_dir=self._run_dir, stop_at=stop_at, env=env)

    def _evaluate(self, plan: Plan) -> None:
        out = self._run_dir / EVALUATION_FILE
        command = [sys.executable, "-m", "train.evaluate", self._checkpoints]
        command += ["--max-images", str(plan.max_images), "--out", str(out)]
        run_stage("evaluation", command)

    def _export(self) -> None:
        out = self._run_dir / "export"
        command = [sys.executable, "-m", "train.export", self._checkpoints]
        command += ["--to", "timm", "--out", str(out)]
        run_stage("export", command)

    def results(self) -> dict[str, Any]:
        """Give what came out, once all stages are done."""
        return {
            "run_dir": str(self._run_dir),
            "evaluation": _read_json(self._run_dir / EVALUATION_FILE),
            "summary": _read_json(self._run_dir / SUMMARY_FILE),
        }

    def _close(self) -> None:
        """Say what came out, and where it is."""
        results = self.results()
        _say("\n== what came out")
        _say(summary_table(results["summary"]))
        _say("")
        for line in _describe_evaluation(results["evaluation"]):
            _say(line)
        names = (
            RECONSTRUCTION_PICTURE,
            LOSS_PICTURE,
            "metrics.jsonl",
            SUMMARY_FILE,
            EVALUATION_FILE,
            "export",
        )
        _say("\nlook at:")
        for name in names:
            _say(f"  {self._run_dir / name}")
        _say(f"  {self._checkpoints}")


def _describe_evaluation(evaluation: dict[str, Any]) -> list[str]:
    lines = [
        f"loss on the masked pixels of {evaluation['num_images']:,} held-out images:",
        f"  mean colour {evaluation['mean_colour_loss']:.4f}   nearby colours "
        f"{evaluation['nearby_colours_loss']:.4f}   the model {evaluation['model_loss']:.4f}",
    ]
    if "knn" in evaluation:
        knn = evaluation["knn"]
        lines.append(
            f"nearest neighbours in frozen features, {knn['num_classes']} classes, "
            f"{knn['num_classified']:,} held-out images among {knn['num_known']:,}: "
            f"untrained {100 * knn['untrained']:.1f}%, trained {100 * knn['trained']:.1f}%"
        )
    return lines


def _read_json(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    # The commands that follow write to the same place, without this program's buffer.
    sys.stdout.flush()
