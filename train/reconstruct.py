"""Pictures from a checkpoint: `python -m train.reconstruct CHECKPOINT [--images FOLDER] [--out
x.png]`."""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.reconstruct")

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pipeline.console import run_command, say_json, say_result, starting
from pipeline.errors import ConfigError
from pipeline.options import Location, Pictures, PngFile, Seed
from train.process.folder import prepare_file


@dataclass(frozen=True)
class Arguments:
    """Draw images as a trained model sees and completes them."""

    checkpoint: tyro.conf.Positional[Location]
    """A step's folder, a folder of checkpoints, or a run's folder; local or a URI."""
    images: Location = ""
    """Folder of pictures, or one picture. Empty: held-out shards."""
    val: Location = ""
    """Held-out shards. Empty: those of the run."""
    out: PngFile = "reconstruction.png"
    """PNG to write."""
    count: Pictures = 8
    """Pictures to draw at most."""
    # train.evaluation.held_out.HELD_OUT_SEED, which cannot be imported without torch.
    seed: Seed = 0
    """Key of the masks; the default is that of the pictures a run draws."""
    json: bool = False
    """Write the result to stdout as JSON: out, step, num_pictures, loss."""


def _run(arguments: Arguments) -> int:
    # Here and not at the top: torch takes seconds, and --help must not wait for it.
    with starting("train.reconstruct"):
        import torch

        from train.evaluation.pictures import draw
        from train.evaluation.saved_model import load_model

    # Before the checkpoint is read: a mistake must not cost minutes of it.
    prepare_file(Path(arguments.out), option="--out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    saved = load_model(arguments.checkpoint, device=device)
    if arguments.images and arguments.val:
        raise ConfigError("--images and --val both name what to draw: give one of them")
    drawn = draw(
        saved,
        Path(arguments.out),
        images=arguments.images,
        val=arguments.val,
        count=arguments.count,
        seed=arguments.seed,
    )
    if arguments.json:
        say_json(
            {
                "out": arguments.out,
                "step": saved.step,
                "num_pictures": drawn.num_pictures,
                "loss": drawn.loss,
            }
        )
    else:
        say_result(
            f"{arguments.out}: step {saved.step}, mean masked loss {drawn.loss:.4f}\n"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        _run,
        Arguments,
        argv,
        module="train.reconstruct",
        interrupted="reconstruct: stopped. No picture was written; the same command starts again.",
    )
