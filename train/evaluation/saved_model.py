"""A trained model out of a checkpoint: for pictures, measurements and export, without other ranks
or an optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from train.checkpoint.state import load_weights
from train.config import RunConfig
from train.errors import CheckpointError
from train.objectives.base import Objective
from train.objectives.choose import choose_objective


@dataclass(frozen=True)
class SavedModel:
    """A model as a checkpoint has it.

    Attributes:
        model: fp32, in eval mode.
        config: settings of the run that saved it.
        step: optimizer steps it has taken.
        uri: what it was loaded from.
    """

    model: nn.Module
    config: RunConfig
    step: int
    uri: str

    @property
    def objective(self) -> Objective:
        """What the model was trained for."""
        return choose_objective(self.config)


def load_model(uri: str, *, device: torch.device | None = None) -> SavedModel:
    """Load a model from a checkpoint.

    Args:
        uri: a step's folder, a folder of checkpoints (its newest), or a run's folder.
        device: where the model is wanted; the CPU by default.

    Raises:
        CheckpointError: nothing finished is there, it is damaged, or its settings are of another
            version.
    """
    tensors, state = load_weights(uri)
    try:
        config = RunConfig.model_validate(state["config"])
    except ValidationError as error:
        first, *_ = error.errors()
        setting = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{uri}: its settings do not fit this version: {setting}: {first['msg']}; use the "
            "version that wrote it"
        ) from error
    # Without memory and without first weights, which the checkpoint's would only replace.
    with torch.device("meta"):
        model = choose_objective(config).build()
    model = model.to_empty(device="cpu")
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{uri}: its tensors are not those of its own settings: {error}"
        ) from error
    if device is None:
        device = torch.device("cpu")
    model = model.to(device).eval()
    step = int(state["step"])
    return SavedModel(model, config, step, uri)


def untrained_like(saved: SavedModel, *, device: torch.device) -> nn.Module:
    """Make the same model with the first weights of its run, which is what its features are
    compared with."""
    # On the CPU, as the run built it: a GPU's generator draws other numbers from the same seed.
    torch.manual_seed(saved.config.train.seed)
    model = saved.objective.build()
    return model.to(device).eval()
