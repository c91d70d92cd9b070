"""Measure a trained model on held-out images: `python -m train.evaluate CHECKPOINT [--val URI]
[--train URI]`.

Three losses on the same masks and the same raw pixels (the model's, painting by the mean colour,
painting by nearby colours), and where there are labels the accuracy of nearest neighbours in the
frozen encoder's features, beside the same figure for the untrained encoder.

Shapes: B images, D encoder width, K neighbours, M training images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from pipeline.dataset import open_dataset
from pipeline.errors import ConfigError, DataError, MaelstromError
from train.evaluation.losses import held_out_losses
from train.evaluation.neighbours import NEIGHBOURS, POOLING, TEMPERATURE, embed, knn_accuracy
from train.evaluation.saved_model import SavedModel, load_model, untrained_like
from train.process.outcome import describe, write_json


@dataclass(frozen=True)
class Arguments:
    """Measure a checkpoint on held-out images."""

    checkpoint: tyro.conf.Positional[str]
    """A step's folder, a folder of checkpoints, or a run's folder; local or a URI."""
    val: str = ""
    """Held-out shards. Empty: those of the run."""
    train: str = ""
    """Training shards, which the neighbours are taken from. Empty: those of the run."""
    max_images: int = 20_000
    """Images to read of each at most, spread evenly."""
    out: str = ""
    """JSON file to write. Empty: only print."""


def evaluate(
    saved: SavedModel, *, val: str, train: str = "", max_images: int | None = None
) -> dict[str, Any]:
    """Measure a model on held-out images.

    Args:
        saved: the model.
        val: URI of the held-out shards.
        train: URI of the training shards; without them, or without labels, there is no neighbour
            figure.
        max_images: images to read of each at most.

    Returns:
        What `held_out_losses` returns, `step`, and with labels `knn`: both accuracies and how they
        came about.
    """
    device = next(saved.model.parameters()).device
    val_data = open_dataset(val)
    result: dict[str, Any] = {"step": saved.step, "norm_pix_loss": saved.config.model.norm_pix_loss}
    result |= held_out_losses(saved, val_data, device=device, limit=max_images)
    if not train or not val_data.info.classes:
        return result
    train_data = open_dataset(train)
    if train_data.info.classes != val_data.info.classes:
        raise DataError(
            f"{train} and {val} name different classes ({len(train_data.info.classes or [])} and "
            f"{len(val_data.info.classes)}): neighbours need one list; convert both from folders "
            "of the same names"
        )
    accuracies = {}
    for name, model in (
        ("trained", saved.model),
        ("untrained", untrained_like(saved, device=device)),
    ):
        known_MD, known_labels_M = embed(model, saved, train_data, device=device, limit=max_images)
        features_BD, labels_B = embed(model, saved, val_data, device=device, limit=max_images)
        accuracies[name] = knn_accuracy(features_BD, labels_B, known_MD, known_labels_M)
    facts = {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE, "pooling": POOLING}
    result["knn"] = {**accuracies, "num_classes": len(val_data.info.classes), **facts}
    return result


def report(result: dict[str, Any]) -> str:
    """Lay the figures out for a terminal."""
    scaled = (
        " (patches scaled back by the true patch's mean and deviation)"
        if result["norm_pix_loss"]
        else ""
    )
    lines = [
        f"masked raw-pixel loss of {result['num_images']} held-out images, same masks for all, "
        f"step {result['step']}:",
        f"  painting by the mean colour    {result['mean_colour_loss']:.4f}",
        f"  painting by nearby colours     {result['nearby_colours_loss']:.4f}",
        f"  the model                      {result['model_loss']:.4f}{scaled}",
    ]
    if "knn" in result:
        knn = result["knn"]
        lines += [
            f"{knn['neighbours']}-nearest-neighbour accuracy over {knn['num_classes']} classes "
            f"({knn['pooling']}):",
            f"  untrained encoder              {100 * knn['untrained']:.1f}%",
            f"  trained encoder                {100 * knn['trained']:.1f}%",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = tyro.cli(Arguments, prog="python -m train.evaluate", args=argv)
    try:
        saved = load_model(
            arguments.checkpoint,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        val = arguments.val or saved.config.data.val
        if not val:
            raise ConfigError("the run has no held-out shards: give their URI with --val")
        train = arguments.train or saved.config.data.train
        result = evaluate(saved, val=val, train=train, max_images=arguments.max_images)
        if arguments.out:
            write_json(Path(arguments.out), result)
        sys.stdout.write(report(result) + "\n")
    except MaelstromError as error:
        sys.stderr.write(describe(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
