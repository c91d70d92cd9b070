"""How far a run is, in steps, images and epochs, also if a step took fewer or more images before.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.config import RunConfig
from train.settings.lengths import total_steps_of

PROGRESS_KEY = "progress"
"""Where a checkpoint keeps it, in what the loop saves."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How much one step takes.

    Args:
        global_batch_size: images of one step.
        steps_per_epoch: steps of one epoch; a fraction if the last batch is filled up.
    """

    global_batch_size: int
    steps_per_epoch: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Images and epochs by step, counted on from the last change of the pace.

    An unbroken run has none: its counts are step x images, and step / steps per epoch, exactly.

    Args:
        pace: of the steps from here on.
        first_pace: of the run's first step. The learning rate is laid out in such steps, so that
            it does not jump if the pace changes.
        step: optimizer steps done when the pace changed.
        images_seen: images taken until then.
        epochs: epochs done until then.
    """

    pace: Pace
    first_pace: Pace
    step: int = 0
    images_seen: int = 0
    epochs: float = 0.0

    @classmethod
    def start(cls, pace: Pace) -> Progress:
        """Give the progress of a run that has taken no step."""
        return cls(pace=pace, first_pace=pace)

    def images_at(self, step: int) -> int:
        """Count the images taken in the steps up to this one."""
        return self.images_seen + (step - self.step) * self.pace.global_batch_size

    def epochs_at(self, step: int) -> float:
        """Count the epochs done in the steps up to this one."""
        return self.epochs + (step - self.step) / self.pace.steps_per_epoch

    def total_steps(self, config: RunConfig) -> int:
        """Derive the run's number of steps: `train.steps`, or those done and what is left of
        `train.epochs`."""
        if config.train.steps is not None:
            return config.train.steps
        assert config.train.epochs is not None, (
            "the settings give exactly one of the two"
        )
        # Rounded once, over what is left: before a change of pace every step was taken whole.
        epochs_left = config.train.epochs - self.epochs
        return max(1, self.step + round(epochs_left * self.pace.steps_per_epoch))

    def schedule_at(self, step: int, config: RunConfig) -> float:
        """Say at which step of the learning rate's schedule a step of the run is."""
        # A length in steps is a schedule in steps; and an unbroken run must not be rounded, or a
        # resumed one would differ from it in the last bit.
        if self.step == 0 or config.train.steps is not None:
            return step
        return self.epochs_at(step) * self.first_pace.steps_per_epoch

    def schedule_length(self, config: RunConfig) -> int:
        """Derive the length of the learning rate's schedule, in steps of the first pace."""
        return total_steps_of(config, steps_per_epoch=self.first_pace.steps_per_epoch)

    def at_pace(self, pace: Pace, *, step: int) -> Progress:
        """Go on from a step at a pace; the same one changes no count."""
        # Counting on from a later step would round anew what an unbroken run counts exactly.
        if pace == self.pace:
            return self
        return dataclasses.replace(
            self,
            pace=pace,
            step=step,
            images_seen=self.images_at(step),
            epochs=self.epochs_at(step),
        )

    def to_json(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        return dataclasses.asdict(self)

    @classmethod
    def from_client(
        cls, client: Mapping[str, Any], *, step: int, batch_size: int, pace: Pace
    ) -> Progress:
        """Read the progress of a checkpoint and go on from it.

        Args:
            client: what the loop has saved.
            step: the checkpoint's step.
            batch_size: `train.global_batch_size` of the start that saved it.
            pace: of the steps from here on.
        """
        kept = client.get(PROGRESS_KEY)
        if kept is None:
            # Version 0.1.0 kept none: its runs had one batch size from the first step on.
            ratio = pace.global_batch_size / batch_size
            before = Pace(batch_size, pace.steps_per_epoch * ratio)
            same = batch_size == pace.global_batch_size
            return cls.start(pace if same else before).at_pace(pace, step=step)
        saved = cls(
            pace=Pace(**kept["pace"]),
            first_pace=Pace(**kept["first_pace"]),
            step=kept["step"],
            images_seen=kept["images_seen"],
            epochs=kept["epochs"],
        )
        return saved.at_pace(pace, step=step)
