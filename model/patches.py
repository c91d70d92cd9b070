"""Images to rows of patches and back.

Shapes: B images, C channels, H height, W width, N patches (row by row), P = patch_size^2 * C.
"""

from __future__ import annotations

from torch import Tensor


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches, row by row.

    Inside a patch the order is row, column, channel: the channel changes fastest, as in every
    published MAE.

    Args:
        images_BCHW: Images; height and width are multiples of patch_size.
        patch_size: Side of a patch in pixels.

    Returns:
        patches_BNP.

    Raises:
        ValueError: The patch size does not divide the image.
    """
    B, C, H, W = images_BCHW.shape
    if H % patch_size or W % patch_size:
        raise ValueError(
            f"images of {H} x {W} pixels do not divide into patches of {patch_size} x {patch_size}"
        )
    rows = H // patch_size
    columns = W // patch_size
    cells = images_BCHW.reshape(B, C, rows, patch_size, columns, patch_size)
    # To (image, row, column, y, x, channel): published weights have the channel change fastest.
    cells = cells.permute(0, 2, 4, 3, 5, 1)
    num_patches = rows * columns
    num_values = patch_size * patch_size * C
    return cells.reshape(B, num_patches, num_values)


def unpatchify(patches_BNP: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches back together; the inverse of `patchify`.

    Args:
        patches_BNP: Patches, row by row.
        patch_size: Side of a patch in pixels.
        grid: Rows and columns of patches.

    Returns:
        images_BCHW.

    Raises:
        ValueError: The number of patches or of values in a patch does not fit.
    """
    B, N, P = patches_BNP.shape
    rows, columns = grid
    if rows * columns != N or P % patch_size**2:
        raise ValueError(
            f"{N} patches of {P} values do not make {rows} x {columns} patches of {patch_size} x "
            f"{patch_size} pixels"
        )
    C = P // patch_size**2
    cells = patches_BNP.reshape(B, rows, columns, patch_size, patch_size, C)
    # From (image, row, column, y, x, channel), as `patchify` made them.
    cells = cells.permute(0, 5, 1, 3, 2, 4)
    height = rows * patch_size
    width = columns * patch_size
    return cells.reshape(B, C, height, width)
