"""A training step on random pixels, without a loader: what the benchmarks of train measure."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from train.config import RunConfig
from train.engine.build import build_engine
from train.objectives.base import random_batch
from train.objectives.choose import choose_objective
from train.process.world import World

LEARNING_RATE = 1e-4
"""Small enough that the loss stays finite on noise for thousands of steps."""


class RandomRun:
    """An engine, the run's objective and one micro-batch of random inputs, the same in every step.

    Args:
        config: settings of the run; its data are not read.
        world: the processes of the run.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        # The loss of a benchmark's first step then tells whether two versions compute the same.
        torch.manual_seed(0)
        self.objective = choose_objective(config)
        model = self.objective.build()
        self.engine = build_engine(config, model=model, resume=None, world=world)
        images = config.train.micro_batch_size
        batch = random_batch(self.objective, images=images, device=self.engine.device)
        self._inputs = self.objective.inputs(batch)

    def forward_backward(self) -> None:
        """Run one micro-batch."""
        self.engine.forward_backward(*self._inputs)

    def update(self) -> None:
        """Take the optimizer's step."""
        self.engine.step(LEARNING_RATE)

    def wait(self) -> None:
        """Wait for the device, for all of the above is only queued on a GPU."""
        wait_for(self.engine.device)

    def step(self) -> None:
        """Take a whole step and wait for it."""
        self.forward_backward()
        self.update()
        self.wait()


def random_config(
    model: ModelConfig, *, images: int, engine: dict[str, object]
) -> RunConfig:
    """Make the settings of a run on one device that takes one micro-batch per step.

    Args:
        model: size of the model.
        images: images per step.
        engine: the section `engine`.
    """
    settings = {
        "model": model.model_dump(),
        "view": {"height": model.image_height, "width": model.image_width},
        "train": {"steps": 1, "global_batch_size": images, "micro_batch_size": images},
        "engine": engine,
    }
    # Through the checks of a run: a combination that cannot be trained is not measured either.
    return RunConfig.model_validate(settings)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that was queued on it."""
    # On a CPU every call has ended when it returns.
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Name a device as tables show it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} threads"
