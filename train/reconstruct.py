"""Pictures from a checkpoint: `python -m train.reconstruct CHECKPOINT [--images FOLDER] [--out
x.png]`.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline.config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.dataset import open_dataset
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.sampling.boxes import mask_noise
from train.evaluation.held_out import MASK_SEED, read_held_out
from train.evaluation.saved_model import SavedModel, load_model
from train.objectives.mae import complete
from train.process.outcome import describe
from train.report.drawing import draw_reconstruction, spread_ids

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Arguments:
    """Draw images as a trained model sees and completes them."""

    checkpoint: tyro.conf.Positional[str]
    """A step's folder, a folder of checkpoints, or a run's folder; local or a URI."""
    images: str = ""
    """Folder of pictures, or one picture. Empty: the run's held-out shards."""
    out: str = "reconstruction.png"
    """PNG to write."""
    count: int = 8
    """Pictures to draw at most."""
    seed: int = MASK_SEED
    """Key of the masks; the default is that of the pictures a run draws."""


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
        DataError: a file is no picture.
    """
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path}: cannot be read as a picture: {error}") from error
        fitted = ImageOps.fit(upright, (width, height), method=Image.Resampling.BICUBIC)
        pictures.append(
            torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).permute(2, 0, 1)
        )
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (torch.stack(pictures) - mean) / std


def find_pictures(source: Path, *, count: int) -> list[Path]:
    """Find the first pictures of a folder, or take the one file.

    Raises:
        ConfigError: nothing is there.
    """
    if source.is_file():
        return [source]
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise ConfigError(
            f"--images {source}: no pictures there ({', '.join(sorted(PICTURE_SUFFIXES))})"
        )
    return found[:count]


def draw(saved: SavedModel, arguments: Arguments) -> float:
    """Draw the pictures that the arguments ask for, and return their mean masked raw-pixel loss."""
    config = saved.config
    device = next(saved.model.parameters()).device
    if arguments.images:
        paths = find_pictures(Path(arguments.images), count=arguments.count)
        images_BCHW = read_pictures(paths, height=config.view.height, width=config.view.width).to(
            device
        )
        ids = np.arange(len(paths), dtype=np.int64)
    elif config.data.val:
        dataset = open_dataset(config.data.val)
        ids = spread_ids(dataset.info.num_samples, arguments.count)
        images_BCHW = read_held_out(config, dataset, ids, device=device).images_BCHW
    else:
        raise ConfigError("the run has no held-out shards: give a folder of pictures with --images")
    noise = mask_noise(arguments.seed, np.zeros_like(ids), ids, config.model.num_patches)
    completion = complete(saved.model, images_BCHW, torch.from_numpy(noise).to(device))
    draw_reconstruction(
        Path(arguments.out), completion, title=f"{config.recipe} after step {saved.step}"
    )
    return completion.loss


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = tyro.cli(Arguments, prog="python -m train.reconstruct", args=argv)
    try:
        saved = load_model(
            arguments.checkpoint,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        loss = draw(saved, arguments)
        sys.stdout.write(f"{arguments.out}: step {saved.step}, mean masked loss {loss:.4f}\n")
    except MaelstromError as error:
        sys.stderr.write(describe(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
