"""Ways a run can end other than done, each with its exit code."""

from __future__ import annotations

from pipeline.errors import MaelstromError


class CheckpointError(MaelstromError):
    """A checkpoint that is missing, damaged, or of another model."""

    exit_code = 4


class NumericsError(MaelstromError):
    """Losses or gradients that stay non-finite, or replicas that drift apart."""

    exit_code = 5


class Preempted(MaelstromError):
    """Asked to stop by a signal or a time limit; the state was saved and the same command goes
    on."""

    exit_code = 75
