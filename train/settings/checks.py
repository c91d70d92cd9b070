"""Checks of a run's settings, with messages that name the setting, the source, the value and the
remedy."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from train.config import RunConfig

Settings = dict[str, Any]
"""Values by dotted name, as far as a source gives them."""


def build_config(
    values: Settings, origins: Mapping[str, str], problems: list[str], *, world_size: int
) -> RunConfig:
    """Check the merged values section by section, so that one bad section does not hide another's
    mistakes.

    Args:
        values: values by dotted name; plus `recipe`.
        origins: which source each value came from, for the messages.
        problems: messages are appended here.
        world_size: ranks of this launch, for the checks across sections.

    Returns:
        The settings; sections with mistakes hold the defaults, and `problems` says so.
    """
    sections: dict[str, Any] = {"recipe": values["recipe"]}
    faulty: set[str] = set()
    _follow_model_size(values, origins)
    for section, field in RunConfig.model_fields.items():
        if section == "recipe":
            continue
        kind = typing.cast("type[BaseModel]", field.annotation)
        given = {
            name.partition(".")[2]: value
            for name, value in values.items()
            if name.startswith(f"{section}.")
        }
        try:
            sections[section] = kind.model_validate(given)
        except ValidationError as error:
            faulty.add(section)
            problems.extend(_explain(section, error, origins))
    config = RunConfig(**sections)
    problems.extend(_cross_checks(config, faulty, origins, world_size=world_size))
    return config


def _follow_model_size(values: Settings, origins: Mapping[str, str]) -> None:
    """Let the view's size be the model's unless it was set: nobody should have to write one size
    twice."""
    from model.config import ModelConfig

    given = {
        name.partition(".")[2]: value for name, value in values.items() if name.startswith("model.")
    }
    try:
        model = ModelConfig.model_validate(given)
    except (
        ValidationError
    ):  # reported with the model's own section; the view's size then stays as it is
        return
    values.setdefault("view.height", model.image_height)
    values.setdefault("view.width", model.image_width)


def _explain(section: str, error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    messages = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
        name = f"{section}.{path}".rstrip(".") if path else section
        name = name if name in origins or not path else f"{section}.{item['loc'][0]!s}"
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error" and not path:
            messages.append(
                text
                if text.startswith(f"{section}.") or f"{section}." in text
                else f"{section}: {text}"
            )
        else:
            origin = f" (from {origins[name]})" if name in origins else ""
            messages.append(f"{name} = {item['input']!r}{origin}: {text[:1].lower()}{text[1:]}")
    return list(dict.fromkeys(messages))


def _cross_checks(
    config: RunConfig, faulty: set[str], origins: Mapping[str, str], *, world_size: int
) -> list[str]:
    """Check what no section can see alone; sections that are faulty already are passed over."""
    problems = []
    if not faulty & {"model", "view"}:
        view, model = (
            (config.view.height, config.view.width),
            (config.model.image_height, config.model.image_width),
        )
        if view != model:
            problems.append(
                f"view.height x view.width is {view[0]} x {view[1]}, the model takes {model[0]} x "
                f"{model[1]} pixels: "
                "leave the view's size out (it follows the model's), or set both alike"
            )
    if "train" not in faulty:
        try:
            config.train.grad_accum_steps(world_size=world_size)
        except ValueError as error:
            problems.append(str(error))
    if not faulty & {"engine"}:
        problems.extend(_engine_checks(config, world_size=world_size))
    if not faulty & {"train", "optim"}:
        warmup, steps = config.optim.warmup_steps, config.train.steps
        if warmup is not None and steps is not None and warmup >= steps:
            problems.append(
                f"optim.warmup_steps {warmup} is not below train.steps {steps}: shorten the warm-up"
            )
        ramp, epochs = config.optim.warmup_epochs, config.train.epochs
        if ramp is not None and epochs is not None and ramp >= epochs:
            problems.append(
                f"optim.warmup_epochs {ramp:g} is not below train.epochs {epochs:g}: shorten the "
                "warm-up"
            )
    return problems


def _engine_checks(config: RunConfig, *, world_size: int) -> list[str]:
    engine, problems = config.engine, []
    if engine.kind == "torch" and world_size > 1:
        problems.append(
            f"engine.kind torch runs one process, not {world_size}: use engine.kind deepspeed"
        )
    if engine.offload_parameters == "cpu" and engine.zero_stage != 3:
        problems.append(
            f"engine.offload_parameters cpu needs engine.zero_stage 3, not {engine.zero_stage}"
        )
    if engine.offload_optimizer == "cpu" and engine.zero_stage == 0:
        problems.append("engine.offload_optimizer cpu needs engine.zero_stage 1, 2 or 3")
    return problems
