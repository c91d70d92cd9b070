"""Fixed two-dimensional sine-cosine position tables, and their interpolation to another grid.

Shapes: N patches (row by row), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of patches."""
BASE = 10000.0
"""Ratio of the slowest to the fastest wavelength. Source: Vaswani et al. 2017, section 3.5."""


def sincos_table(grid: Grid, embed_dim: int) -> Tensor:
    """Compute the position table of a grid of patches, with a row of zeros for the class token.

    The row of the patch at (row, column) is [sin(column w) | cos(column w) | sin(row w) | cos(row
    w)], where w runs over embed_dim / 4 frequencies from 1 down to 1 / 10000. The column comes
    first: published weights depend on it. Computed in float64 and rounded once, so that it is the
    same on every machine; works on the meta device.

    Args:
        grid: Rows and columns of patches.
        embed_dim: Width; a multiple of 4.

    Returns:
        table of shape (1, 1 + N, embed_dim), float32.

    Raises:
        ValueError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(
            f"embed_dim {embed_dim} is not a multiple of 4, which a sine-cosine table needs"
        )
    rows, columns = grid
    num_frequencies = embed_dim // 4
    steps = torch.arange(num_frequencies, dtype=torch.float64)
    exponents = steps / num_frequencies
    omega = BASE**-exponents

    # Patches row by row, as `patchify` lays them out: the column changes fastest.
    column = torch.arange(columns, dtype=torch.float64)
    row = torch.arange(rows, dtype=torch.float64)
    column_of_N = column.repeat(rows)
    row_of_N = row.repeat_interleave(columns)
    across = column_of_N.unsqueeze(1) * omega
    down = row_of_N.unsqueeze(1) * omega
    parts = [across.sin(), across.cos(), down.sin(), down.cos()]
    patches_ND = torch.cat(parts, dim=1)

    # The class token has no position.
    cls_1D = torch.zeros(1, embed_dim, dtype=torch.float64)
    table = torch.cat([cls_1D, patches_ND])
    # With an axis for the batch, as in published state dicts.
    return table.unsqueeze(0).to(torch.float32)


def interpolate_table(table: Tensor, old_grid: Grid, new_grid: Grid) -> Tensor:
    """Resample a position table to another grid, bicubic, leaving the class token's row as it is.

    This is what published fine-tuning at other resolutions does (no antialiasing, corners not
    aligned). For pre-training from scratch compute a new `sincos_table` instead.

    Args:
        table: Shape (1, 1 + rows * columns, D).
        old_grid: Rows and columns of the table.
        new_grid: Rows and columns wanted.

    Returns:
        Table of shape (1, 1 + new rows * new columns, D), in the table's own type.

    Raises:
        ValueError: The table does not belong to old_grid.
    """
    rows, columns = old_grid
    num_rows = 1 + rows * columns
    if table.ndim != 3 or table.shape[:2] != (1, num_rows):
        raise ValueError(
            f"position table of shape {tuple(table.shape)} does not belong to a grid of {rows} x "
            f"{columns} patches: expected (1, {1 + rows * columns}, width)"
        )
    if old_grid == new_grid:
        return table
    cls = table[:, :1]
    patches = table[:, 1:]
    # In float32, so that a table in 16 bits is rounded once, at the end.
    picture = patches.reshape(1, rows, columns, -1)
    picture = picture.permute(0, 3, 1, 2)
    picture = picture.to(torch.float32)
    picture = F.interpolate(
        picture,
        size=new_grid,
        mode="bicubic",
        align_corners=False,
    )
    picture = picture.permute(0, 2, 3, 1)
    patches = picture.flatten(1, 2)
    patches = patches.to(table.dtype)
    return torch.cat([cls, patches], dim=1)
