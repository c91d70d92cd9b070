"""Nearest neighbours in frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from pipeline.dataset import Manifest
from train.evaluation.held_out import iterate_held_out
from train.evaluation.saved_model import SavedModel

NEIGHBOURS = 20
"""Neighbours that vote. Source: Caron et al. 2021 (DINO), section 4.1: 20 was best throughout."""
TEMPERATURE = 0.07
"""Votes weigh exp(cosine / temperature). Source: Wu et al. 2018, section 3.4; DINO uses the
same."""
POOLING = "mean of the patch tokens after the final norm, without the class token"


@torch.no_grad()
def embed(
    model: nn.Module,
    saved: SavedModel,
    dataset: Manifest,
    *,
    device: torch.device,
    limit: int | None = None,
    label: str,
) -> tuple[Tensor, Tensor]:
    """Describe whole images by an encoder.

    Args:
        model: the trained model, or an untrained one of the same make.
        saved: whose objective and settings say how images are read and where the encoder is.
        dataset: which images.
        device: where to compute.
        limit: images to read at most.
        label: which encoder and images, for the progress.

    Returns:
        features_MD, unit length, and labels_M.
    """
    objective = saved.objective
    encoder = objective.encoder(model)
    batches = iterate_held_out(
        saved.config, objective, dataset, device=device, limit=limit, label=label
    )
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        features_BD = encoder.features(batch.images_BCHW)
        # Of unit length, so that a product is a cosine; in fp32, which tells near ones apart.
        unit_BD = F.normalize(features_BD.float(), dim=1)
        features.append(unit_BD)
        labels.append(batch.labels_B)
    features_MD = torch.cat(features)
    labels_M = torch.cat(labels)
    return features_MD, labels_M


def knn_accuracy(
    features_BD: Tensor,
    labels_B: Tensor,
    known_MD: Tensor,
    known_labels_M: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
) -> float:
    """Classify by the nearest known images: cosine top-k, votes weighing exp(cosine / 0.07).

    Args:
        features_BD: of the images to classify, unit length.
        labels_B: their classes.
        known_MD: features of labelled images, unit length.
        known_labels_M: their classes, from 0.
        neighbours: how many vote; fewer if there are fewer known images.

    Returns:
        Share that is classified right, 0 to 1.
    """
    similarity_BM = features_BD @ known_MD.T
    num_voting = min(neighbours, len(known_MD))
    similarity_BK, index_BK = similarity_BM.topk(num_voting, dim=1)
    # A class that no known image has cannot win, so it needs no column.
    num_classes = int(known_labels_M.max()) + 1
    votes = torch.zeros(len(features_BD), num_classes, device=features_BD.device)
    weight_BK = (similarity_BK / TEMPERATURE).exp()
    votes.scatter_add_(1, known_labels_M[index_BK], weight_BK)
    is_right_B = votes.argmax(dim=1) == labels_B
    return float(is_right_B.float().mean())
