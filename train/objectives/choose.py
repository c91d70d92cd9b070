"""Which objective a run trains."""

from __future__ import annotations

from train.config import RunConfig
from train.objectives.base import Objective
from train.objectives.mae import MaskedAutoencoding


def choose_objective(config: RunConfig) -> Objective:
    """Give the objective that the settings ask for.

    There is one, and no setting for it yet. When the second comes, so does its setting,
    with this one as the default: checkpoints made before must go on loading.
    """
    return MaskedAutoencoding(config)
