"""Patch projections for another patch size.

Shapes: D width, C channels, p old patch size, q new patch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor


def resample_kernel(weight_DCpp: Tensor, patch_size: int) -> Tensor:
    """Change a patch projection's patch size so that resized patches keep their tokens.

    Solves, in the least-squares sense, that the new kernel on a bilinearly resized patch gives what
    the old kernel gave on the patch. Enlarging is exact. Plain interpolation of the kernel would
    change the tokens' scale. Source: Beyer et al. 2023 (FlexiViT), section 3.4.

    Args:
        weight_DCpp: Kernel with square patches.
        patch_size: New side in pixels, at least 1.

    Returns:
        Kernel of shape (D, C, patch_size, patch_size), in the old one's type.
    """
    old_size = weight_DCpp.shape[-1]
    resize_qp = _resize_matrix(old_size, patch_size)
    solve_pq: Tensor = torch.linalg.pinv(resize_qp)
    solve_pq = solve_pq.to(weight_DCpp.device)
    # A bilinear resize works on rows and columns apart: one matrix from the left, one from the
    # right. In float64, and rounded once.
    exact_DCpp = weight_DCpp.to(torch.float64)
    resampled_DCqq = solve_pq.mT @ exact_DCpp @ solve_pq
    return resampled_DCqq.to(weight_DCpp.dtype)


def _resize_matrix(old: int, new: int) -> Tensor:
    """The bilinear resize of a line of pixels as a matrix of shape (new, old), float64."""
    basis = torch.eye(old, dtype=torch.float64).unsqueeze(0)  # each row is one impulse
    resized: Tensor = F.interpolate(basis, size=new, mode="linear", align_corners=False)
    return resized[0].transpose(0, 1)
