"""Settings by dotted name, laid over each other: defaults, recipe, TOML file, command line."""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from train.config import RunConfig
from train.settings.checks import Settings

PROGRAM = "train.pretrain"
EITHER_OR = (("train.steps", "train.epochs"), ("optim.warmup_steps", "optim.warmup_epochs"))
"""Pairs of which exactly one is given: a source that sets one unsets the other one of the sources
below it."""


# ------------------------------------------------------------------------------------------ sources
def flatten(nested: Mapping[str, Any], prefix: str = "") -> Settings:
    """Give the values of nested sections by dotted name."""
    flat: Settings = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def setting_types() -> dict[str, Any]:
    """Give the annotation of every setting by dotted name."""
    types: dict[str, Any] = {}
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            hints = typing.get_type_hints(field.annotation)
            types.update(
                {f"{section}.{name}": hints[name] for name in field.annotation.model_fields}
            )
    return types


def _read_toml(path: str, problems: list[str]) -> Settings:
    try:
        with Path(path).open("rb") as file:
            return {
                name.replace("-", "_"): value for name, value in flatten(tomllib.load(file)).items()
            }
    except FileNotFoundError:
        problems.append(f"--config {path}: no such file")
    except OSError as error:
        problems.append(f"--config {path}: cannot be read: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"--config {path}: not TOML: {error}")
    return {}


def default_values() -> Settings:
    """Give every default but the view's size, which follows the model's."""
    values = flatten(RunConfig().model_dump(exclude={"recipe"}))
    return {
        name: value for name, value in values.items() if name not in ("view.height", "view.width")
    }


def merge(
    layers: Sequence[tuple[str, Settings]], problems: list[str]
) -> tuple[Settings, dict[str, str]]:
    """Lay the sources over each other, the later ones on top; report the names that no setting
    has."""
    known = setting_types()
    merged: Settings = {}
    origins: dict[str, str] = {}
    for origin, values in layers:
        for name, value in values.items():
            if name not in known:
                if name != "recipe":
                    problems.append(
                        f"unknown setting {_shown(name, origin)}{_did_you_mean(name, list(known))}"
                    )
                continue
            merged[name] = value
            if origin != "defaults":
                origins[name] = origin
        for pair in EITHER_OR:
            given = [name for name in pair if values.get(name) is not None]
            if len(given) == 1:
                merged[pair[1 - pair.index(given[0])]] = None
    return merged, origins


# --------------------------------------------------------------------------------------------- text
def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if not close:  # the right field in the wrong section, or without one
        field = name.rpartition(".")[2]
        close = [option for option in known if option.rpartition(".")[2] == field][:2]
    if not close:
        fields = {option.rpartition(".")[2]: option for option in known}
        close = [
            fields[match]
            for match in difflib.get_close_matches(name.rpartition(".")[2], list(fields), n=1)
        ]
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f": there are {', '.join(known)}" if len(known) < 10 else ": see --help"


def _shown(name: str, origin: str) -> str:
    return f"--{_dashed(name)}" if origin == "command line" else f"{name} in {origin}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
