"""Two ways to paint hidden patches without learning anything: what a model has to beat.

Both see exactly the visible patches, and give patches of raw (not normalised) pixels for
`model.objectives.mae.masked_loss` and `model.objectives.mae.reconstruct` with norm_pix_loss off.

Shapes: B images, C channels, H height, W width, N patches, P = patch_size^2 * C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.patches import patchify


def paint_mean(images_BCHW: Tensor, mask_BN: Tensor, *, patch_size: int) -> Tensor:
    """Paint every patch in the mean colour of the image's visible patches.

    Args:
        images_BCHW: Normalised images.
        mask_BN: 1 for a hidden patch; at least one patch of each image is visible.
        patch_size: Side of a patch in pixels.

    Returns:
        prediction_BNP, float32.
    """
    visible_BN1 = (1 - mask_BN).unsqueeze(-1)
    colours_BNC = _patch_colours(images_BCHW, patch_size)
    shown_BNC = colours_BNC * visible_BN1
    sum_B1C = shown_BNC.sum(1, keepdim=True)
    count_B11 = visible_BN1.sum(1, keepdim=True)
    mean_B1C = sum_B1C / count_B11
    mean_BNC = mean_B1C.expand_as(colours_BNC)
    return _flat_patches(mean_BNC, patch_size)


def paint_nearby(images_BCHW: Tensor, mask_BN: Tensor, *, patch_size: int) -> Tensor:
    """Paint every hidden patch in the mean of the visible patches' colours, weighted by 1 /
    distance squared.

    Distances are between patch centres (Shepard's interpolation). A visible patch gets its own mean
    colour.

    Args:
        images_BCHW: Normalised images.
        mask_BN: 1 for a hidden patch; at least one patch of each image is visible.
        patch_size: Side of a patch in pixels.

    Returns:
        prediction_BNP, float32.
    """
    rows = images_BCHW.shape[2] // patch_size
    columns = images_BCHW.shape[3] // patch_size
    colours_BNC = _patch_colours(images_BCHW, patch_size)
    # In units of a patch, row by row as `patchify` counts them.
    number_N = torch.arange(rows * columns, device=images_BCHW.device)
    row_N = number_N // columns
    column_N = number_N % columns
    centres_N2 = torch.stack([row_N, column_N], dim=1)
    centres_N2 = centres_N2.to(torch.float32)
    offsets_NN2 = centres_N2[:, None] - centres_N2[None]
    distance_NN = offsets_NN2.square().sum(-1)
    # A patch's distance to itself is 0; its own weight is used only if it is visible, and then its
    # own colour is taken below.
    weight_NN = 1 / distance_NN.fill_diagonal_(1)
    visible_B1N = (1 - mask_BN).unsqueeze(1)
    weight_BNN = weight_NN * visible_B1N
    sum_BNC = weight_BNN @ colours_BNC
    total_weight_BN1 = weight_BNN.sum(-1, keepdim=True)
    near_BNC = sum_BNC / total_weight_BN1
    is_hidden_BN1 = mask_BN.unsqueeze(-1) > 0
    painted_BNC = torch.where(is_hidden_BN1, near_BNC, colours_BNC)
    return _flat_patches(painted_BNC, patch_size)


def _patch_colours(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Mean colour of each patch, float32, shape (B, N, C)."""
    B, C = images_BCHW.shape[:2]
    images_BCHW = images_BCHW.to(torch.float32)
    patches_BNP = patchify(images_BCHW, patch_size)
    num_pixels = patch_size**2
    pixels = patches_BNP.view(B, -1, num_pixels, C)
    return pixels.mean(dim=2)


def _flat_patches(colours_BNC: Tensor, patch_size: int) -> Tensor:
    """Patches of one colour each; the channel changes fastest, as in `patchify`."""
    return colours_BNC.repeat(1, 1, patch_size**2)
