"""Measure a trained model on held-out images: `python -m train.evaluate CHECKPOINT [--val URI]
[--train URI]`.

Three losses on the same masks and the same raw pixels (the model's, painting by the mean colour,
painting by nearby colours). If the images have labels, also the accuracy of nearest neighbours in
the frozen encoder's features, next to the same figure for the untrained encoder.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.evaluate")

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pipeline.console import run_command, say_json, say_result, starting
from pipeline.errors import ConfigError
from pipeline.options import Count, JsonFile, Location
from train.process.folder import prepare_file
from train.process.outcome import write_json


@dataclass(frozen=True)
class Arguments:
    """Measure a checkpoint on held-out images."""

    checkpoint: tyro.conf.Positional[Location]
    """A step's folder, a folder of checkpoints, or a run's folder; local or a URI."""
    val: Location = ""
    """Held-out shards. Empty: those of the run."""
    train: Location = ""
    """Training shards, which the neighbours are taken from. Empty: those of the run."""
    max_images: Count = 20_000
    """Images to read of each at most, spread evenly."""
    out: JsonFile = ""
    """JSON file to write. Empty: only print."""
    json: bool = False
    """Write the figures to stdout as JSON in place of a table."""


def _run(arguments: Arguments) -> int:
    # Here and not at the top: torch takes seconds, and --help must not wait for it.
    with starting("train.evaluate"):
        import torch

        from train.evaluation.saved_model import load_model
        from train.evaluation.scores import evaluate, report

    # Before the checkpoint is read and minutes of measuring: the result must have a place.
    if arguments.out:
        prepare_file(Path(arguments.out), option="--out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved = load_model(arguments.checkpoint, device=device)
    val = arguments.val or saved.config.data.val
    if not val:
        raise ConfigError("the run has no held-out shards: give their URI with --val")
    train = arguments.train or saved.config.data.train
    result = evaluate(
        saved,
        val=val,
        train=train,
        max_images=arguments.max_images,
    )
    if arguments.out:
        write_json(Path(arguments.out), result, option="--out")
    if arguments.json:
        say_json(result)
    else:
        say_result(report(result) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        _run,
        Arguments,
        argv,
        module="train.evaluate",
        interrupted="evaluate: stopped. No result was written; the same command starts again.",
    )
