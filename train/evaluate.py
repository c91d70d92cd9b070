"""Measure a trained model on held-out images: `python -m train.evaluate CHECKPOINT [--val URI] [--train URI]`.

Three losses on the same masks and the same raw pixels (the model's, painting by the mean colour, painting by nearby
colours), and where there are labels the accuracy of nearest neighbours in the frozen encoder's features, beside the
same figure for the untrained encoder.

Shapes: B images, D encoder width, K neighbours, M training images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
import tyro
from torch import Tensor

from model.baselines import paint_mean, paint_nearby
from model.mae import MAEOutput, MaskedAutoencoder, reconstruction_target
from model.patches import patchify
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.manifest import Manifest, open_dataset
from train.held_out import HeldOut, iterate_held_out
from train.outcome import describe, write_json
from train.pictures import raw_losses
from train.saved_model import SavedModel, load_model, untrained_like

NEIGHBOURS = 20
"""Neighbours that vote. Source: Caron et al. 2021 (DINO), section 4.1: 20 was best throughout."""
TEMPERATURE = 0.07
"""Votes weigh exp(cosine / temperature). Source: Wu et al. 2018, section 3.4; DINO uses the same."""
POOLING = "mean of the patch tokens after the final norm, without the class token"


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


def held_out_losses(
    saved: SavedModel, dataset: Manifest, *, device: torch.device, limit: int | None = None
) -> dict[str, Any]:
    """Score a model and the two paintings on the same masks, in raw (dataset-normalised) pixels.

    Args:
        saved: the model.
        dataset: held-out images.
        device: where to compute.
        limit: images to read at most.

    Returns:
        num_images, model_loss, mean_colour_loss, nearby_colours_loss: means over images.
    """
    sums: dict[str, float] = {"model_loss": 0.0, "mean_colour_loss": 0.0, "nearby_colours_loss": 0.0}
    count = 0
    for held_out in iterate_held_out(saved.config, dataset, device=device, limit=limit):
        for name, losses_B in _three_losses(saved.model, held_out).items():
            sums[name] += float(losses_B.sum())
        count += len(held_out.images_BCHW)
    return {"num_images": count, **{name: total / count for name, total in sums.items()}}


@torch.no_grad()
def _three_losses(model: MaskedAutoencoder, held_out: HeldOut) -> dict[str, Tensor]:
    images_BCHW = held_out.images_BCHW
    output: MAEOutput = model(images_BCHW, held_out.noise_BN)
    target_BNP = reconstruction_target(patchify(images_BCHW, model.patch_size), norm_pix_loss=False)
    losses = {"model_loss": raw_losses(model, images_BCHW, output)}
    for name, paint in (("mean_colour_loss", paint_mean), ("nearby_colours_loss", paint_nearby)):
        painted_BNP = paint(images_BCHW, output.mask_BN, patch_size=model.patch_size)
        error_BN = (painted_BNP - target_BNP).square().mean(dim=-1)
        losses[name] = (error_BN * output.mask_BN).sum(dim=1) / output.mask_BN.sum(dim=1)
    return losses


@torch.no_grad()
def embed(
    model: MaskedAutoencoder, saved: SavedModel, dataset: Manifest, *, device: torch.device, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Describe whole images by an encoder.

    Args:
        model: the encoder.
        saved: whose settings say how images are read.
        dataset: which images.
        device: where to compute.
        limit: images to read at most.

    Returns:
        features_MD, unit length, and labels_M.
    """
    features, labels = [], []
    for held_out in iterate_held_out(saved.config, dataset, device=device, limit=limit):
        features.append(F.normalize(model.features(held_out.images_BCHW).float(), dim=1))
        labels.append(held_out.labels_B)
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    features_BD: Tensor, labels_B: Tensor, known_MD: Tensor, known_labels_M: Tensor, *, neighbours: int = NEIGHBOURS
) -> float:
    """Classify by the nearest known images: cosine top-k, votes weighing exp(cosine / 0.07).

    Args:
        features_BD: of the images to classify, unit length.
        labels_B: their classes.
        known_MD: features of labelled images, unit length.
        known_labels_M: their classes, from 0.
        neighbours: how many vote; fewer where there are fewer known images.

    Returns:
        Share that is classified right, 0 to 1.
    """
    similarity_BK, index_BK = (features_BD @ known_MD.T).topk(min(neighbours, len(known_MD)), dim=1)
    num_classes = int(known_labels_M.max()) + 1
    votes = torch.zeros(len(features_BD), num_classes, device=features_BD.device)
    votes.scatter_add_(1, known_labels_M[index_BK], (similarity_BK / TEMPERATURE).exp())
    return float((votes.argmax(dim=1) == labels_B).float().mean())


def evaluate(saved: SavedModel, *, val: str, train: str = "", max_images: int | None = None) -> dict[str, Any]:
    """Measure a model on held-out images.

    Args:
        saved: the model.
        val: URI of the held-out shards.
        train: URI of the training shards; without them, or without labels, there is no neighbour figure.
        max_images: images to read of each at most.

    Returns:
        What `held_out_losses` returns, `step`, and with labels `knn`: both accuracies and how they came about.
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
            f"{len(val_data.info.classes)}): neighbours need one list; convert both from folders of the same names"
        )
    accuracies = {}
    for name, model in (("trained", saved.model), ("untrained", untrained_like(saved, device=device))):
        known_MD, known_labels_M = embed(model, saved, train_data, device=device, limit=max_images)
        features_BD, labels_B = embed(model, saved, val_data, device=device, limit=max_images)
        accuracies[name] = knn_accuracy(features_BD, labels_B, known_MD, known_labels_M)
    facts = {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE, "pooling": POOLING}
    result["knn"] = {**accuracies, "num_classes": len(val_data.info.classes), **facts}
    return result


def report(result: dict[str, Any]) -> str:
    """Lay the figures out for a terminal."""
    scaled = " (patches scaled back by the true patch's mean and deviation)" if result["norm_pix_loss"] else ""
    lines = [
        f"masked raw-pixel loss of {result['num_images']} held-out images, same masks for all, step {result['step']}:",
        f"  painting by the mean colour    {result['mean_colour_loss']:.4f}",
        f"  painting by nearby colours     {result['nearby_colours_loss']:.4f}",
        f"  the model                      {result['model_loss']:.4f}{scaled}",
    ]
    if "knn" in result:
        knn = result["knn"]
        lines += [
            f"{knn['neighbours']}-nearest-neighbour accuracy over {knn['num_classes']} classes ({knn['pooling']}):",
            f"  untrained encoder              {100 * knn['untrained']:.1f}%",
            f"  trained encoder                {100 * knn['trained']:.1f}%",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = tyro.cli(Arguments, prog="python -m train.evaluate", args=argv)
    try:
        saved = load_model(arguments.checkpoint, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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
