"""Which patches are hidden: a function of noise that the caller draws.

Shapes: B images, N patches, V visible patches, E width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class PatchMask(NamedTuple):
    """One random split of every image's patches into visible and hidden ones."""

    ids_shuffle_BN: Tensor
    """Patch numbers in shuffled order: the first V are kept."""
    ids_keep_BV: Tensor
    """Patch numbers that the encoder sees, in shuffled order."""
    ids_restore_BN: Tensor
    """Index of each patch in the shuffled order; the inverse of `ids_shuffle_BN`."""
    mask_BN: Tensor
    """1 for a removed patch, 0 for a kept one, in the image's order; float32."""


def mask_patches(noise_BN: Tensor, num_visible: int) -> PatchMask:
    """Keep the patches with the smallest noise, image by image.

    No number is drawn here: the same noise gives the same mask on every device and at every world
    size. Equal values are ordered by patch number (a stable sort), so ties are settled too.

    Args:
        noise_BN: One number per patch, of any type that sorts; do not round it to 16 bits, which
            makes ties common.
        num_visible: V, patches kept per image, from 0 to N.

    Returns:
        Indices and mask.

    Raises:
        ValueError: num_visible is out of range.
    """
    N = noise_BN.shape[1]
    if not 0 <= num_visible <= N:
        raise ValueError(f"cannot keep {num_visible} of {N} patches")
    ids_shuffle_BN = torch.argsort(noise_BN, dim=1, stable=True)
    # Sorting a permutation gives its inverse; its values differ, so this sort need not be stable.
    ids_restore_BN = torch.argsort(ids_shuffle_BN, dim=1)
    is_hidden_BN = ids_restore_BN >= num_visible
    return PatchMask(
        ids_shuffle_BN=ids_shuffle_BN,
        ids_keep_BV=ids_shuffle_BN[:, :num_visible],
        ids_restore_BN=ids_restore_BN,
        mask_BN=is_hidden_BN.to(torch.float32),
    )


def gather_rows(rows_BNE: Tensor, ids_BV: Tensor) -> Tensor:
    """Pick rows of every image.

    Args:
        rows_BNE: Tokens or patches.
        ids_BV: Row numbers.

    Returns:
        rows_BVE.
    """
    # `expand` takes no memory: every value of a row is picked by the same number.
    width = rows_BNE.shape[-1]
    ids_BV1 = ids_BV.unsqueeze(-1)
    ids_BVE = ids_BV1.expand(-1, -1, width)
    return torch.gather(rows_BNE, 1, ids_BVE)


class _Unshuffle(torch.autograd.Function):
    """Undo a shuffle of rows. The gradient of a permutation is the inverse permutation: a gather,
    like the forward.

    Autograd's own gradient of `gather` is a scatter-add, which is slow in 16 bits on a GPU, and
    refuses or slows down when deterministic algorithms are asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_BNE: Tensor, ids_shuffle_BN: Tensor, ids_restore_BN: Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids_shuffle_BN)
        return gather_rows(rows_BNE, ids_restore_BN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ids_shuffle_BN,) = ctx.saved_tensors
        return gather_rows(grads[0], ids_shuffle_BN), None, None


def unshuffle(rows_BNE: Tensor, mask: PatchMask) -> Tensor:
    """Bring shuffled rows (visible ones first) back into the image's order.

    Args:
        rows_BNE: Rows in shuffled order, one per patch.
        mask: The split that shuffled them.

    Returns:
        rows_BNE in the image's order.
    """
    restored_BNE: Tensor = _Unshuffle.apply(
        rows_BNE, mask.ids_shuffle_BN, mask.ids_restore_BN
    )  # type: ignore[no-untyped-call]
    return restored_BNE
