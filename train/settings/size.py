"""How large a run is, said before it is started. Needs no process group and no accelerator."""

from __future__ import annotations

import os

from model.flops import parameter_counts, train_flops
from pipeline.dataset import open_dataset
from pipeline.errors import MaelstromError
from train.config import RunConfig
from train.process.place import world_size_of
from train.settings.devices import find_device
from train.settings.engine_rules import device_problems, machine_problems
from train.settings.fit import describe_fit, device_bytes_of
from train.settings.lengths import refuse_lengths, steps_per_epoch_of, total_steps_of


def describe_size(config: RunConfig) -> list[str]:
    """Describe steps, batches, parameters, operations and memory of a run.

    Args:
        config: checked settings; with `data.train` the dataset's index is opened, without it epochs
            stay epochs.

    Returns:
        Lines for people.

    Raises:
        ConfigError: the settings cannot work with a dataset of this size.
    """
    world_size = world_size_of(os.environ)
    batch = config.train.global_batch_size
    accum = config.train.grad_accum_steps(world_size=world_size)
    counts = parameter_counts(config.model)
    engine = config.engine
    flops = train_flops(
        config.model,
        encoder=engine.activation_checkpointing,
        decoder=engine.decoder_activation_checkpointing,
    )
    encoder_parameters = counts.encoder + counts.encoder_pos_embed
    micro_batch = config.train.micro_batch_size
    lines = [
        _steps_line(config),
        f"batch: {batch} images = {micro_batch} x {accum} accumulated x {world_size} ranks",
        f"peak learning rate: {config.optim.base_lr * batch / 256:g}",
        f"parameters: {counts.total:,} ({encoder_parameters:,} in the encoder)",
        f"training operations: {flops / 1e9:.1f} GFLOP an image, {flops * batch / 1e12:.2f} TFLOP "
        "a step",
        f"checkpoints: {config.checkpoint_dir}, every {config.checkpoint.every_steps} steps",
    ]
    fit = describe_fit(
        config, world_size=world_size, device_bytes=device_bytes_of(config)
    )
    device = find_device(os.environ)
    # Notes, not mistakes: a dry run may be of a run for another machine.
    notes = machine_problems(config)
    if device is not None:
        notes += device_problems(config.engine, device)
    return [
        *lines,
        *fit,
        *(f"not on this machine: {note}" for note in notes),
    ]


def _steps_line(config: RunConfig) -> str:
    steps = config.train.steps
    epochs = config.train.epochs or 0.0
    if not config.data.train:
        if steps is not None:
            return f"steps: {steps:,}"
        return f"steps: {epochs:g} epochs; give data.train to know the steps"
    try:
        num_samples = open_dataset(config.data.train).info.num_samples
    except MaelstromError as error:
        # The data may come later, or lie where only the run's machines can read it.
        return f"steps: {epochs:g} epochs or {steps} steps; the data cannot be read yet: {error}"

    # What a start refuses, a dry run refuses too.
    refuse_lengths(config, num_samples=num_samples)
    per_epoch = steps_per_epoch_of(config, num_samples=num_samples)
    total = total_steps_of(config, steps_per_epoch=per_epoch)
    length = f"{per_epoch:.1f} an epoch of {num_samples:,} images, {total / per_epoch:.1f} epochs"
    return f"steps: {total:,} ({length})"
