"""Pictures of `train.reconstruct`: photographs as a trained model sees and completes them.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import ConfigError, DataError
from pipeline.loader import Batch
from train.evaluation.held_out import HELD_OUT_SEED, open_given, read_held_out
from train.evaluation.saved_model import SavedModel
from train.objectives.base import make_batch
from train.process.folder import writing
from train.report.drawing import draw_reconstruction, spread_ids

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
)


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Args:
        num_pictures: images in the drawing.
        loss: mean of their masked raw-pixel losses.
    """

    num_pictures: int
    loss: float


def read_pictures(paths: Sequence[Path], *, height: int, width: int) -> Tensor:
    """Read picture files as the model takes them: upright, the largest centred box, bicubic,
    normalised.

    Args:
        paths: picture files.
        height: wanted, in pixels.
        width: wanted, in pixels.

    Returns:
        images_BCHW, float32.

    Raises:
        DataError: a file cannot be read as a picture.
    """
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                # Cameras store the sensor's rows and a note how to turn them.
                turned = ImageOps.exif_transpose(opened)
                upright = turned.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path}: cannot be read as a picture: {error}") from error
        size = (width, height)
        fitted = ImageOps.fit(upright, size, method=Image.Resampling.BICUBIC)
        levels_HWC = np.asarray(fitted, dtype=np.float32)
        pixels_HWC = levels_HWC / 255
        picture_HWC = torch.from_numpy(pixels_HWC)
        pictures.append(picture_HWC.permute(2, 0, 1))
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (torch.stack(pictures) - mean) / std


def find_pictures(source: Path, *, count: int) -> list[Path]:
    """Find the first pictures of a folder, or take the one file.

    Raises:
        ConfigError: the folder holds no picture.
    """
    if source.is_file():
        return [source]
    paths = []
    for path in source.rglob("*"):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            paths.append(path)
    # The order of a folder is the file system's: sorted, the same pictures are drawn everywhere.
    paths.sort()
    if not paths:
        suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
        raise ConfigError(f"--images {source}: no pictures there ({suffixes})")
    return paths[:count]


def draw(
    saved: SavedModel,
    out: Path,
    *,
    images: str = "",
    val: str = "",
    count: int = 8,
    seed: int = HELD_OUT_SEED,
) -> Drawn:
    """Draw images as a model sees and completes them.

    Args:
        saved: the model.
        out: PNG to write.
        images: a folder of pictures, or one picture. Empty: held-out shards.
        val: URI of the held-out shards. Empty: the run's.
        count: pictures at most.
        seed: key of the draws, e.g. of the masks.

    Raises:
        ConfigError: there are no images to draw, or models of this objective make no pictures.
        DataError: a picture cannot be read.
        InfrastructureError: the PNG cannot be written.
    """
    config = saved.config
    objective = saved.objective
    device = next(saved.model.parameters()).device
    if images:
        batch = _batch_of_files(saved, Path(images), count=count, seed=seed)
    elif val or config.data.val:
        shards = val or config.data.val
        dataset = open_given(
            shards, setting="data.val", option="--images FOLDER or --val"
        )
        ids = spread_ids(dataset.info.num_samples, count)
        batch = read_held_out(config, objective, dataset, ids, device=device, seed=seed)
    else:
        raise ConfigError(
            "the run has no held-out shards: give a folder of pictures with --images, or shards "
            "with --val"
        )

    completion = objective.pictures(saved.model, batch)
    if completion is None:
        raise ConfigError(f"{saved.uri}: models of its objective make no pictures")
    title = f"{config.recipe} after step {saved.step}"
    with writing(out, option="--out"):
        draw_reconstruction(out, completion, title=title)
    return Drawn(len(batch.labels_B), completion.loss)


def _batch_of_files(saved: SavedModel, source: Path, *, count: int, seed: int) -> Batch:
    """Make a batch of picture files, each at the size of every view."""
    device = next(saved.model.parameters()).device
    paths = find_pictures(source, count=count)
    sampling = saved.objective.sampling()
    views_BCHW = []
    for view in sampling.views:
        size = view.settings
        pictures_BCHW = read_pictures(paths, height=size.height, width=size.width)
        views_BCHW.append(pictures_BCHW.to(device))
    return make_batch(sampling, views_BCHW, seed=seed)
