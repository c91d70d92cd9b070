"""The figures of `train.evaluate`, and their text for a terminal.

Shapes: B images, D encoder width, M training images.
"""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.dataset import Manifest
from pipeline.errors import DataError, MaelstromError
from train.evaluation.held_out import open_given
from train.evaluation.losses import held_out_losses
from train.evaluation.neighbours import (
    NEIGHBOURS,
    POOLING,
    TEMPERATURE,
    embed,
    knn_accuracy,
)
from train.evaluation.saved_model import SavedModel, untrained_like

_FIGURES = {"knn": "accuracy of nearest neighbours"}


def evaluate(
    saved: SavedModel, *, val: str, train: str = "", max_images: int | None = None
) -> dict[str, Any]:
    """Measure a model on held-out images.

    Args:
        saved: the model.
        val: URI of the held-out shards.
        train: URI of the training shards, for the neighbours; empty if there are none.
        max_images: images to read of each at most.

    Returns:
        What `held_out_losses` returns, `step`, and with labels `knn`: both accuracies and how they
        came about; without, `not_measured`: why, by the name of the figure.

    Raises:
        DataError: the held-out shards cannot be read.
    """
    device = next(saved.model.parameters()).device
    val_data = open_given(val, setting="data.val", option="--val")
    losses = held_out_losses(saved, val_data, device=device, limit=max_images)
    result: dict[str, Any] = {
        "step": saved.step,
        "norm_pix_loss": saved.config.model.norm_pix_loss,
        **losses,
    }
    # The losses took minutes and need no training shards: whatever is wrong with those, they stay.
    try:
        train_data = _open_known(train, val_data)
    except MaelstromError as error:
        result["not_measured"] = {"knn": storage.redact(str(error))}
        return result

    accuracies = _accuracies(saved, train_data, val_data, max_images=max_images)
    # With all that the figure depends on: neighbours of another number or pooling do not compare.
    result["knn"] = {
        **accuracies,
        "num_classes": len(val_data.info.classes or []),
        "neighbours": NEIGHBOURS,
        "temperature": TEMPERATURE,
        "pooling": POOLING,
    }
    return result


def _open_known(train: str, val_data: Manifest) -> Manifest:
    """Open the images that neighbours are looked for among.

    Raises:
        DataError: there are none whose classes are those of the held-out images.
    """
    if not val_data.info.classes:
        raise DataError(
            f"{val_data.uri} has no labels, which the neighbours' accuracy needs"
        )
    if not train:
        raise DataError("the run names no training shards: give their URI with --train")
    train_data = open_given(train, setting="data.train", option="--train")
    # Names, not counts: equal numbers with other names would give a figure of chance.
    known = train_data.info.classes or []
    wanted = val_data.info.classes
    if known == wanted:
        return train_data
    only_known = [name for name in known if name not in wanted]
    only_wanted = [name for name in wanted if name not in known]
    differing = f"only in the former: {_shown(only_known)}; only in the latter: "
    differing += f"{_shown(only_wanted)}; "
    if not only_known and not only_wanted:
        differing = "the same names in another order; "
    raise DataError(
        f"{train_data.uri} and {val_data.uri} name different classes ({len(known)} and "
        f"{len(wanted)}; {differing}neighbours need one list): give training shards of the same "
        "classes with --train, or convert both from folders of the same names"
    )


def _shown(names: list[str]) -> str:
    return (
        ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
    )


def _accuracies(
    saved: SavedModel,
    train_data: Manifest,
    val_data: Manifest,
    *,
    max_images: int | None,
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
    for name, why in result.get("not_measured", {}).items():
        lines.append(f"not measured: {_FIGURES[name]}: {why}")
    return "\n".join(lines)
