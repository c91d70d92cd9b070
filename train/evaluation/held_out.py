"""Held-out images, cut and drawn for alike every time: what pictures and held-out losses are made
from.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline import storage
from pipeline.config import LoaderConfig
from pipeline.console import Progress
from pipeline.dataset import Manifest, open_dataset
from pipeline.errors import DataError
from pipeline.loader import Batch, read_samples
from train.config import RunConfig
from train.objectives.base import Objective

HELD_OUT_SEED = 0
"""Key of the draws (e.g. masks) of every held-out measurement, whatever the run's seed: two runs
are scored on the same ones."""
BATCH_SIZE = 128
"""Images that are read and measured together."""
SHOW_AFTER_S = 2.0
"""A pass over the images that is done sooner shows no progress."""


def measuring_loader(config: RunConfig) -> LoaderConfig:
    """Give the run's reading settings with the decoder that is always there, so that figures of
    machines compare."""
    # DALI and FFCV round the pixels differently, and are not installed everywhere. The tuning
    # file is that of the machine that trained.
    return config.loader.model_copy(update={"decoder": "turbo", "tuning_file": ""})


def open_given(uri: str, *, setting: str, option: str) -> Manifest:
    """Open a dataset that a checkpoint's settings or a command line name.

    Args:
        uri: folder of shards.
        setting: name of the setting that holds it.
        option: option that names another place.

    Raises:
        DataError: it is not there; with what to do if the run's folder was moved.
    """
    if storage.is_local(uri):
        path = storage.local_path(uri)
        if not path.exists():
            relative = ""
            if not path.is_absolute():
                relative = (
                    f" The path is relative to the folder that the run was started in; this is "
                    f"{Path.cwd()}."
                )
            raise DataError(
                f"{setting} {uri}: no such folder.{relative} Say where the shards are now: "
                f"{option} URI"
            )
    return open_dataset(uri)


def read_held_out(
    config: RunConfig,
    objective: Objective,
    dataset: Manifest,
    sample_ids_B: npt.NDArray[np.int64],
    *,
    device: torch.device,
    seed: int = HELD_OUT_SEED,
) -> Batch:
    """Read some images of a dataset as they are measured: the largest centred boxes, not flipped.

    Args:
        config: settings of the run; the loader's are read.
        objective: whose views and draws.
        dataset: where from.
        sample_ids_B: which.
        device: where they are wanted.
        seed: key of the draws.
    """
    # No random crop or flip: the figure must not depend on how an image happened to be cut.
    sampling = objective.sampling().centred()
    settings = measuring_loader(config)
    return read_samples(
        dataset, sample_ids_B, sampling, settings, seed=seed, device=device
    )


def iterate_held_out(
    config: RunConfig,
    objective: Objective,
    dataset: Manifest,
    *,
    device: torch.device,
    limit: int | None = None,
    label: str,
) -> Iterator[Batch]:
    """Read a whole dataset as it is measured, or an even spread of it.

    Args:
        config: settings of the run.
        objective: whose views and draws.
        dataset: where from.
        device: where the images are wanted.
        limit: images to read at most.
        label: what is being done with them, for the progress shown after some seconds.
    """
    num_samples = dataset.info.num_samples
    count = min(num_samples, limit or num_samples)
    # Spread evenly, because datasets are often stored class by class: the first would be of few.
    numbers = np.arange(count, dtype=np.int64)
    ids = numbers * num_samples // count
    with Progress(label, total=count, after_s=SHOW_AFTER_S) as progress:
        for first in range(0, count, BATCH_SIZE):
            piece = ids[first : first + BATCH_SIZE]
            yield read_held_out(config, objective, dataset, piece, device=device)
            # After the yield: a batch counts once it has been used, not once it has been read.
            progress.advance(len(piece))
