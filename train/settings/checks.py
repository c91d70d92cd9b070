"""Checks of a run's settings, with messages that name the setting, the source, the value and the
remedy."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from model.config import ModelConfig
from train.config import RunConfig
from train.settings.devices import Device
from train.settings.engine_rules import (
    batch_problems,
    decoder_problems,
    engine_problems,
)
from train.settings.lengths import IMAGES_OF_BASE_LR, peak_lr

Settings = dict[str, Any]
"""Values by dotted name, as far as a source gives them."""


def build_config(
    values: Settings,
    origins: Mapping[str, str],
    problems: list[str],
    *,
    world_size: int,
    world_source: str = "",
    device: Device | None = None,
) -> RunConfig:
    """Check the merged values section by section, so that one bad section does not hide another's
    mistakes.

    Args:
        values: values by dotted name; plus `recipe`.
        origins: which source each value came from, for the messages.
        problems: messages are appended here.
        world_size: ranks of this launch, for the checks across sections.
        world_source: where that number comes from, for the messages.
        device: what the ranks compute on; None if it is not known.

    Returns:
        The settings; sections with mistakes hold the defaults, and `problems` says so.
    """
    sections: dict[str, Any] = {"recipe": values["recipe"]}
    faulty: set[str] = set()
    _follow_model_size(values)
    for section, field in RunConfig.model_fields.items():
        if section == "recipe":
            continue
        kind = typing.cast("type[BaseModel]", field.annotation)
        try:
            sections[section] = kind.model_validate(_values_of(section, values))
        except ValidationError as error:
            faulty.add(section)
            problems.extend(_explain(section, error, origins))
    config = RunConfig(**sections)

    # A faulty section holds its defaults here: what they contradict is not the user's mistake.
    checks = (
        ({"model", "view"}, _size_problems(config)),
        ({"train"}, batch_problems(config, world_size=world_size, source=world_source)),
        (
            {"engine"},
            engine_problems(config.engine, world_size=world_size, device=device),
        ),
        ({"loader", "view"}, decoder_problems(config)),
        ({"train", "optim"}, _warmup_problems(config)),
        ({"train", "optim"}, _rate_problems(config)),
    )
    for read, found in checks:
        if not faulty & read:
            problems.extend(found)
    return config


def _values_of(section: str, values: Settings) -> Settings:
    """Give the values of one section by field name."""
    prefix = f"{section}."
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _follow_model_size(values: Settings) -> None:
    """Let the view's size be the model's unless it was set: nobody should have to write one size
    twice."""
    try:
        model = ModelConfig.model_validate(_values_of("model", values))
    except ValidationError:
        # Reported with the model's own section; the view's size then stays as it is.
        return
    values.setdefault("view.height", model.image_height)
    values.setdefault("view.width", model.image_width)


def _explain(
    section: str,
    error: ValidationError,
    origins: Mapping[str, str],
) -> list[str]:
    """Put pydantic's findings into words, each once."""
    messages = []
    for item in error.errors():
        # Numbers in a location are places in a tuple; a user sets the tuple as a whole.
        fields = [str(part) for part in item["loc"] if not isinstance(part, int)]
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error" and not fields:
            # A rule between fields, which names them itself.
            messages.append(text if f"{section}." in text else f"{section}: {text}")
            continue
        name = ".".join([section, *fields])
        if fields and name not in origins:
            # Inside a value, such as one of a union's types: the setting is the first part.
            name = f"{section}.{item['loc'][0]!s}"
        origin = f" (from {origins[name]})" if name in origins else ""
        messages.append(
            f"{name} = {item['input']!r}{origin}: {text[:1].lower()}{text[1:]}"
        )
    return list(dict.fromkeys(messages))


def _size_problems(config: RunConfig) -> list[str]:
    view, model = config.view, config.model
    if (view.height, view.width) == (model.image_height, model.image_width):
        return []
    return [
        f"view.height x view.width is {view.height} x {view.width}, the model takes "
        f"{model.image_height} x {model.image_width} pixels: "
        "leave the view's size out (it follows the model's), or set both alike"
    ]


def _warmup_problems(config: RunConfig) -> list[str]:
    optim, train = config.optim, config.train
    # Steps and epochs cannot be compared before the dataset is open, see `lengths`; like with like
    # can.
    pairs = (
        ("optim.warmup_steps", optim.warmup_steps, "train.steps", train.steps),
        ("optim.warmup_epochs", optim.warmup_epochs, "train.epochs", train.epochs),
    )
    return [
        f"{name} {warmup:g} is not below {length_name} {length:g}: shorten the warm-up"
        for name, warmup, length_name, length in pairs
        if warmup is not None and length is not None and warmup >= length
    ]


def _rate_problems(config: RunConfig) -> list[str]:
    optim = config.optim
    batch = config.train.global_batch_size
    peak = peak_lr(config)
    if optim.min_lr <= peak:
        return []
    return [
        f"optim.min_lr {optim.min_lr:g} is above the peak rate {peak:g} = optim.base_lr "
        f"{optim.base_lr:g} x {batch} / {IMAGES_OF_BASE_LR}, so the rate would rise to the end: "
        "lower optim.min_lr"
    ]
