"""The figures of `train.evaluate`, and their text for a terminal.

Shapes: B images, D encoder width, M training images.
"""

from __future__ import annotations

from typing import Any

from pipeline.dataset import Manifest, open_dataset
from pipeline.errors import DataError
from train.evaluation.losses import held_out_losses
from train.evaluation.neighbours import NEIGHBOURS, POOLING, TEMPERATURE, embed, knn_accuracy
from train.evaluation.saved_model import SavedModel, untrained_like


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

    Raises:
        DataError: the two datasets name different classes.
    """
    device = next(saved.model.parameters()).device
    val_data = open_dataset(val)
    losses = held_out_losses(saved, val_data, device=device, limit=max_images)
    result: dict[str, Any] = {
        "step": saved.step,
        "norm_pix_loss": saved.config.model.norm_pix_loss,
        **losses,
    }
    if not train or not val_data.info.classes:
        return result

    train_data = open_dataset(train)
    _refuse_other_classes(train_data, val_data)
    accuracies = _accuracies(saved, train_data, val_data, max_images=max_images)
    # With all that the figure depends on: neighbours of another number or pooling do not compare.
    result["knn"] = {
        **accuracies,
        "num_classes": len(val_data.info.classes),
        "neighbours": NEIGHBOURS,
        "temperature": TEMPERATURE,
        "pooling": POOLING,
    }
    return result


def _refuse_other_classes(train_data: Manifest, val_data: Manifest) -> None:
    """Compare names, not counts: equal numbers with other names would give a figure of chance."""
    known = train_data.info.classes or []
    wanted = val_data.info.classes or []
    if known == wanted:
        return
    raise DataError(
        f"{train_data.uri} and {val_data.uri} name different classes ({len(known)} and "
        f"{len(wanted)}): neighbours need one list; convert both from folders of the same names"
    )


def _accuracies(
    saved: SavedModel, train_data: Manifest, val_data: Manifest, *, max_images: int | None
) -> dict[str, Any]:
    """Classify by neighbours with the trained encoder, and with the one it started from."""
    device = next(saved.model.parameters()).device
    # An untrained encoder is far better than chance: colours alone tell many classes apart.
    untrained = untrained_like(saved, device=device)
    encoders = {"trained": saved.model, "untrained": untrained}
    found: dict[str, Any] = {}
    for name, model in encoders.items():
        known_MD, known_labels_M = embed(
            model,
            saved,
            train_data,
            device=device,
            limit=max_images,
            label=f"{name} encoder, training images",
        )
        features_BD, labels_B = embed(
            model,
            saved,
            val_data,
            device=device,
            limit=max_images,
            label=f"{name} encoder, held-out images",
        )
        found[name] = knn_accuracy(features_BD, labels_B, known_MD, known_labels_M)
        # Fewer known images give a lower share: a figure says on how many it was measured.
        counts = {"num_classified": len(labels_B), "num_known": len(known_labels_M)}
        found |= counts
    return found


def report(result: dict[str, Any]) -> str:
    """Lay the figures out for a terminal."""
    scaled = ""
    if result["norm_pix_loss"]:
        # Such a model predicts no brightness: without the true one its loss would compare with
        # neither painting.
        scaled = " (patches scaled back by the true patch's mean and deviation)"
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
            f"({knn['pooling']}), {knn['num_classified']} held-out images among {knn['num_known']} "
            "training images:",
            f"  untrained encoder              {100 * knn['untrained']:.1f}%",
            f"  trained encoder                {100 * knn['trained']:.1f}%",
        ]
    return "\n".join(lines)
