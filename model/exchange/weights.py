"""Weights of other libraries: names out, names in, and a strict check on both ways.

Pure functions on dictionaries of tensors; none of them reads or writes files. Our own names are
those of the published MAE checkpoints, so most of the work is leaving out what a library does not
want.

Shapes: B images, C channels, N patches, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.exchange.hf_names import (
    HFNames,
    State,
    Tensors,
    hf_config,
    rename_from_hf,
    rename_to_hf,
)
from model.exchange.resample import resample_kernel
from model.objectives.mae import MaskedAutoencoder, is_decoder_name
from model.pos_embed import Grid, interpolate_table, sincos_table

Shape = tuple[int, ...]
Part = Literal["encoder", "full"]
ENCODER_ONLY_HEADS = ("head.", "fc_norm.")
"""Prefixes of a classifier's own weights, which a masked autoencoder has no place for."""
_WRAPPERS = ("model", "state_dict")
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")


class WeightsError(ValueError):
    """Weights that do not belong to the model, or a model that another library cannot represent."""


def _refuse_other_than_square(config: ModelConfig, library: str, remedy: str) -> None:
    """Refuse images that are not square, for libraries whose position tables have one side."""
    if config.image_height == config.image_width:
        return
    raise WeightsError(
        f"the model takes images of {config.image_height} x {config.image_width} pixels, and "
        f"{library} only takes square ones. {remedy}"
    )


def expected_shapes(config: ModelConfig, part: Part = "full") -> dict[str, Shape]:
    """List the names and shapes of a model's state dict, without allocating it.

    Args:
        config: The model.
        part: `encoder` leaves out the mask token and everything of the decoder.

    Returns:
        Shapes by name, in the order of the state dict.
    """
    # The meta device holds shapes without memory: a ViT-H would take 2.6 GB.
    with torch.device("meta"):
        state = MaskedAutoencoder(config).state_dict()
    shapes = {}
    for name, value in state.items():
        if part == "full" or not is_decoder_name(name):
            shapes[name] = tuple(value.shape)
    return shapes


def check_weights(
    state: Tensors, expected: Mapping[str, Shape], *, source: str
) -> None:
    """Refuse weights whose names or shapes are not exactly those expected.

    Args:
        state: Tensors by name.
        expected: Shapes by name.
        source: What the weights are, for the message.

    Raises:
        WeightsError: With a table of everything that is missing, unexpected or of another shape.
    """
    # All of them: one name alone does not tell a wrong size from a wrong generation of names.
    missing = []
    for name in expected:
        if name not in state:
            missing.append(name)
    unexpected = []
    shapes = {}
    for name, value in state.items():
        shapes[name] = tuple(value.shape)
        if name not in expected:
            unexpected.append(name)
    mismatched = []
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            mismatched.append(name)
    if not (missing or unexpected or mismatched):
        return
    rows: list[tuple[object, ...]] = []
    for name in missing:
        rows.append(("missing", name, expected[name], "-"))
    for name in unexpected:
        rows.append(("unexpected", name, "-", shapes[name]))
    for name in mismatched:
        rows.append(("shape", name, expected[name], shapes[name]))
    raise WeightsError(
        f"{source} does not fit the model: {len(missing)} missing, {len(unexpected)} unexpected, "
        f"{len(mismatched)} of another shape\n{_table(rows)}\n"
        "Use the configuration that these weights were trained with."
    )


def to_mae(
    state: Tensors, config: ModelConfig, *, part: Part = "full"
) -> dict[str, State]:
    """Give weights the form of the published MAE checkpoints.

    Args:
        state: A full state dict of ours.
        config: The model it belongs to.
        part: `full` like `mae_visualize_vit_*.pth`, `encoder` like `mae_pretrain_vit_*.pth`.

    Returns:
        {"model": tensors by name}; save it as it is.

    Raises:
        WeightsError: The state does not belong to the configuration.
    """
    check_weights(state, expected_shapes(config), source="the state dict to export")
    exported = {}
    for name, value in state.items():
        if part == "full" or not is_decoder_name(name):
            exported[name] = value
    return {"model": exported}


def to_timm(state: Tensors, config: ModelConfig) -> State:
    """Give the encoder the form of a timm VisionTransformer with num_classes=0.

    timm's names are ours. Decoder and mask token are left out: a strict load would refuse them.

    Args:
        state: A full state dict of ours.
        config: The model it belongs to.

    Returns:
        Tensors by name.

    Raises:
        WeightsError: The state does not belong to the configuration.
    """
    wrapped = to_mae(state, config, part="encoder")
    return wrapped["model"]


def to_detectron2(
    state: Tensors, config: ModelConfig, *, patch_size: int | None = None
) -> dict[str, State]:
    """Give the encoder the form that Detectron2's ViTDet loads with its matching heuristics.

    ViTDet wants 16-pixel patches. For ViT-H/14 ask for patch_size=16: the projection is resampled
    so that an enlarged patch gives the token the small one gave, and the position table is
    resampled to the new grid (224-pixel images: 16 x 16 to 14 x 14). How the published 14-to-16
    weights were made was not described; ours are not theirs.

    Args:
        state: A full state dict of ours.
        config: The model it belongs to.
        patch_size: Patch size wanted; the model's own if absent.

    Returns:
        {"model": tensors by name}; save it as it is.

    Raises:
        WeightsError: The state does not belong to the configuration.
        ValueError: The patch size does not divide the image.
    """
    _refuse_other_than_square(
        config,
        "ViTDet's table of absolute positions",
        "Use --to timm, which takes both sides.",
    )
    encoder = to_timm(state, config)
    if patch_size is None or patch_size == config.patch_size:
        return {"model": encoder}
    # Through the settings' own checks: a patch size that does not divide the image is refused.
    settings = {**config.model_dump(), "patch_size": patch_size}
    other = ModelConfig(**settings)
    grid = other.grid
    kernel = encoder["patch_embed.proj.weight"]
    encoder["patch_embed.proj.weight"] = resample_kernel(kernel, patch_size)
    table = encoder["pos_embed"]
    encoder["pos_embed"] = interpolate_table(table, config.grid, grid)
    return {"model": encoder}


def to_hf(
    state: Tensors,
    config: ModelConfig,
    *,
    part: Part = "full",
    names: HFNames = "legacy",
) -> tuple[State, dict[str, Any]]:
    """Give weights the form of transformers' ViTMAEForPreTraining.

    Args:
        state: A full state dict of ours.
        config: The model it belongs to.
        part: `encoder` for ViTMAEModel, which takes images that are not square.
        names: `legacy` names load in every transformers release (5.x renames them while loading);
            `v5` names are those of the modules in 5.x, for `load_state_dict`.

    Returns:
        Tensors by name, and the contents of config.json.

    Raises:
        WeightsError: The state does not belong to the configuration.
    """
    check_weights(state, expected_shapes(config), source="the state dict to export")
    weights = rename_to_hf(state, names)
    settings = hf_config(config)
    if part == "full":
        _refuse_other_than_square(
            config,
            "transformers' ViTMAEForPreTraining",
            "Export the encoder alone with --part encoder, or use --to timm.",
        )
        return weights, settings
    settings["architectures"] = ["ViTMAEModel"]
    return {
        name: value for name, value in weights.items() if name.startswith("vit.")
    }, settings


def from_published(state: Mapping[str, Any]) -> State:
    """Translate a published checkpoint to our names.

    Understands the MAE and timm names, both generations of transformers' names, a `model` or
    `state_dict` wrapper, and the `module.` and `_orig_mod.` prefixes of wrapped models. A
    classifier's head is left out.

    Args:
        state: What was read from the file.

    Returns:
        Tensors by our names; other names are passed on for `fit_weights` to refuse.

    Raises:
        WeightsError: Not a dictionary of tensors.
    """
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    # Optimizer state or settings beside the weights: which of them are the weights is a guess.
    others = []
    for name, value in state.items():
        if not isinstance(value, Tensor):
            others.append(str(name))
    others.sort()
    if others or not state:
        wrappers = " or ".join(repr(wrapper) for wrapper in _WRAPPERS)
        problem = "it is empty"
        if others:
            first_others = ", ".join(others[:8])
            problem = f"no tensor under: {first_others}"
        raise WeightsError(
            f"expected a dictionary of tensors, or one under {wrappers}; {problem}"
        )
    plain = {}
    for name, value in state.items():
        plain[_PREFIX.sub("", name)] = value
    # Our own names and timm's begin with none of these.
    their_prefixes = ("vit.", "embeddings.", "decoder.")
    if any(name.startswith(their_prefixes) for name in plain):
        plain = rename_from_hf(plain)
    # A fine-tuned classifier's encoder is as good as any; its head has no place here.
    kept = {}
    for name, value in plain.items():
        if not name.startswith(ENCODER_ONLY_HEADS):
            kept[name] = value
    return kept


def fit_weights(
    state: Tensors,
    config: ModelConfig,
    *,
    part: Part = "full",
    old_grid: Grid | None = None,
) -> State:
    """Check weights against a configuration, and resample position tables made for another image
    size.

    Args:
        state: Tensors by our names; see `from_published`.
        config: The model that is to take them.
        part: What must be there. `encoder` also takes a full state and leaves the decoder out.
        old_grid: Rows and columns that the position tables were made for. If absent, the grid that
            the table's own sines and cosines tell, or else a square.

    Returns:
        Tensors by name, exactly those of the part, for `load_state_dict` (strict for `full`).

    Raises:
        WeightsError: Names or shapes differ; the message lists all of them. Or a position table
            has as many rows as the model's, but is of a grid of another shape.
    """
    fitted = {}
    for name, value in state.items():
        if part == "full" or not is_decoder_name(name):
            fitted[name] = value
    # The tables are the only tensors whose shape depends on the image's size.
    for name in ("pos_embed", "decoder_pos_embed"):
        table = fitted.get(name)
        # One of another rank is left for the check to report.
        if table is None or table.ndim != 3:
            continue
        grid = old_grid or _find_grid(name, table, config)
        if grid != config.grid:
            fitted[name] = interpolate_table(table, grid, config.grid)
    expected = expected_shapes(config, part)
    check_weights(fitted, expected, source="the checkpoint")
    return fitted


def load_published(
    model: MaskedAutoencoder,
    state: Mapping[str, Any],
    *,
    part: Part = "full",
    old_grid: Grid | None = None,
) -> None:
    """Load a published checkpoint, full or encoder only, into a model.

    Args:
        model: Changed in place. With `encoder` its decoder is left as it is.
        state: What was read from the file; see `from_published`.
        part: What to load.
        old_grid: Rows and columns that the position tables were made for; see `fit_weights`.

    Raises:
        WeightsError: Names, shapes or the grid of a position table differ; the model is as it was.
    """
    ours = from_published(state)
    # Checked in whole before the first tensor is copied.
    fitted = fit_weights(ours, model.config, part=part, old_grid=old_grid)
    model.load_state_dict(fitted, strict=part == "full")


def _find_grid(name: str, table: Tensor, config: ModelConfig) -> Grid:
    """Find the grid that a position table was made for.

    Raises:
        WeightsError: It has as many patches as the model's, in another shape, or may have.
    """
    num_patches = table.shape[1] - 1
    side = round(max(num_patches, 0) ** 0.5)
    is_square = num_patches > 0 and side * side == num_patches
    # A fixed table says itself which grid it is of; a learned one does not.
    grid = _grid_of_sines(table)
    if grid is None and is_square:
        grid = (side, side)
    if grid is None:
        # A length that is not a square is left for the check to report.
        return config.grid
    if num_patches == config.num_patches and grid != config.grid:
        rows, columns = config.grid
        raise WeightsError(
            f"{name}: the table is of {grid[0]} x {grid[1]} patches, the model has {rows} x "
            f"{columns}, which are as many in another shape. Give old_grid=({grid[0]}, {grid[1]}) "
            f"to resample it, or old_grid=({rows}, {columns}) if it was made for the model's own "
            "grid."
        )
    return grid


def _grid_of_sines(table: Tensor) -> Grid | None:
    """Give the grid of a fixed sine-cosine table; None if it is none, e.g. a learned one."""
    num_patches = table.shape[1] - 1
    width = table.shape[2]
    if table.shape[0] != 1 or num_patches < 1 or width % 4:
        return None
    for rows in range(1, num_patches + 1):
        if num_patches % rows:
            continue
        grid = (rows, num_patches // rows)
        fixed = sincos_table(grid, width)
        # Files may hold the table in 16 bits.
        stored = table.detach().cpu().float()
        if torch.allclose(stored, fixed, atol=0.01):
            return grid
    return None


def _table(rows: Iterable[tuple[object, ...]], limit: int = 20) -> str:
    """Lay rows out in columns; long lists are cut."""
    cells: list[tuple[str, ...]] = [("problem", "name", "expected", "found")]
    for row in rows:
        row_texts = [str(value) for value in row]
        cells.append(tuple(row_texts))
    # One more than the limit, for the titles.
    shown = cells[: limit + 1]
    widths = []
    for column in zip(*shown, strict=True):
        lengths = [len(cell) for cell in column]
        widths.append(max(lengths))
    lines = []
    for texts in shown:
        padded = []
        for cell, width in zip(texts, widths, strict=True):
            padded.append(cell.ljust(width))
        line = "  ".join(padded)
        lines.append(line.rstrip())
    if len(cells) > len(shown):
        num_left = len(cells) - len(shown)
        lines.append(f"... and {num_left} more")
    return "\n".join(f"  {line}" for line in lines)
