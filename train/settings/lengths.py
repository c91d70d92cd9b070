"""The length and the peak rate of a run, and checks that need the size of the dataset: steps and
epochs can only be compared with it."""

from __future__ import annotations

from pipeline import storage
from pipeline.dataset import open_dataset
from pipeline.dataset.info import DATASET_FILE
from pipeline.errors import ConfigError, DataError
from train.config import RunConfig

IMAGES_OF_BASE_LR = 256
"""Batch that base_lr is quoted for. Source: He et al. 2022, table 8 (lr = base_lr x batch /
256)."""


def peak_lr(config: RunConfig, *, global_batch_size: int | None = None) -> float:
    """Return the learning rate at the end of the warm-up.

    Args:
        config: settings of the run.
        global_batch_size: the batch that the rate is scaled to; by default that of the settings.
    """
    batch = (
        config.train.global_batch_size
        if global_batch_size is None
        else global_batch_size
    )
    return config.optim.base_lr * batch / IMAGES_OF_BASE_LR


def steps_per_epoch_of(config: RunConfig, *, num_samples: int) -> float:
    """Give the global batches of an epoch; a fraction if the last one is filled from the next.

    Args:
        config: settings of the run.
        num_samples: images of the training data.
    """
    # The same rule as `Order.steps_per_epoch`, which needs the index of the whole dataset.
    batch = config.train.global_batch_size
    if config.order.remainder == "drop":
        return float(num_samples // batch)
    return num_samples / batch


def total_steps_of(config: RunConfig, *, steps_per_epoch: float) -> int:
    """Derive the run's number of optimizer steps from `train.steps` or `train.epochs`."""
    # Exact: a resumed run compares its step with this number.
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None, "the settings give exactly one of the two"
    return max(1, round(config.train.epochs * steps_per_epoch))


def length_problems(config: RunConfig, *, num_samples: int) -> list[str]:
    """List the settings that cannot work with a dataset of this size.

    Args:
        config: checked settings of the run.
        num_samples: images of the training data, at least 1.

    Returns:
        Messages that name the setting, its value and the remedy; empty if all is well.
    """
    batch = config.train.global_batch_size
    per_epoch = steps_per_epoch_of(config, num_samples=num_samples)
    if per_epoch == 0:
        return [
            f"order.remainder drop: the dataset holds {num_samples:,} samples, fewer than one "
            f"train.global_batch_size of {batch:,}, so an epoch has no step: use order.remainder "
            "fill, or a smaller batch"
        ]

    # In steps, whichever units were used.
    total = total_steps_of(config, steps_per_epoch=per_epoch)
    warmup = float(config.optim.warmup_steps or 0)
    written = f"optim.warmup_steps {config.optim.warmup_steps}"
    if config.optim.warmup_epochs is not None:
        warmup = config.optim.warmup_epochs * per_epoch
        written = f"optim.warmup_epochs {config.optim.warmup_epochs:g}"
    # No warm-up is fine for a run of a single step too.
    if warmup < total or warmup == 0:
        return []

    length = f"train.steps {config.train.steps}"
    if config.train.epochs is not None:
        length = f"train.epochs {config.train.epochs:g}"
    # A twentieth is what the published recipes take: 40 of 800 epochs.
    shorter = max(0, total // 20)
    return [
        f"{written} is {warmup:,.0f} steps at {num_samples:,} images, not below the {total:,} "
        f"steps of {length}: the rate would never reach its peak. Shorten the warm-up, e.g. "
        f"--optim.warmup-steps {shorter}, or lengthen the run"
    ]


def refuse_lengths(config: RunConfig, *, num_samples: int) -> None:
    """Refuse what cannot work with a dataset of this size.

    Args:
        config: checked settings of the run.
        num_samples: images of the training data.

    Raises:
        ConfigError: naming the settings.
    """
    problems = length_problems(config, num_samples=num_samples)
    if problems:
        raise ConfigError("\n".join(problems))


def known_num_samples(config: RunConfig) -> int | None:
    """Tell the images of the training data, as far as it can be told at once.

    Args:
        config: settings of the run.

    Returns:
        The number; None if the data has no index yet, which the run will write, or is damaged,
        which the run will say.

    Raises:
        MaelstromError: the storage failed, or the URI is not valid.
    """
    uri = config.data.train
    if not uri:
        return None
    try:
        # Without it opening would scan every shard: minutes, and the run does it once anyway.
        index = uri if uri.endswith(DATASET_FILE) else storage.join(uri, DATASET_FILE)
        if not storage.exists(index):
            return None
        return open_dataset(uri).info.num_samples
    except DataError:
        return None
