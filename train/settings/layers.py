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
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            continue
        # The fields' own annotations are strings: the files postpone their evaluation.
        hints = typing.get_type_hints(kind)
        for name in kind.model_fields:
            types[f"{section}.{name}"] = hints[name]
    return types


def read_toml(path: str, problems: list[str]) -> Settings:
    """Read a TOML file's values by dotted name; empty if it cannot be read, and `problems` says
    why."""
    try:
        with Path(path).open("rb") as file:
            values = flatten(tomllib.load(file))
    except FileNotFoundError:
        problems.append(f"--config {path}: no such file")
    except OSError as error:
        problems.append(f"--config {path}: cannot be read: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"--config {path}: not TOML: {error}")
    else:
        # Dashes as on the command line are understood here too.
        return {name.replace("-", "_"): value for name, value in values.items()}
    return {}


def default_values() -> Settings:
    """Give every default but the view's size, which follows the model's."""
    values = flatten(RunConfig().model_dump(exclude={"recipe"}))
    del values["view.height"]
    del values["view.width"]
    return values


def merge(
    layers: Sequence[tuple[str, Settings]], problems: list[str]
) -> tuple[Settings, dict[str, str]]:
    """Lay the sources over each other, the later ones on top; report the names that no setting
    has.

    Args:
        layers: name and values of each source, the weakest first.
        problems: messages are appended here.

    Returns:
        The values, and the source of each that is not a default.
    """
    known = setting_types()
    merged: Settings = {}
    origins: dict[str, str] = {}
    for origin, values in layers:
        for name, value in values.items():
            if name in known:
                merged[name] = value
                if origin != "defaults":
                    origins[name] = origin
            # Written by `--dry-run` for the reader; the recipe is the command line's first word.
            elif name != "recipe":
                hint = did_you_mean(name, list(known))
                problems.append(f"unknown setting {_shown(name, origin)}{hint}")
        _unset_others(values, merged)
    return merged, origins


def _unset_others(values: Settings, merged: Settings) -> None:
    """Let a source that sets one of a pair unset the other, which a source below it has set."""
    for first, second in EITHER_OR:
        has_first = values.get(first) is not None
        has_second = values.get(second) is not None
        # Both given by one source stay: the section's own check says that it is a mistake.
        if has_first and not has_second:
            merged[second] = None
        if has_second and not has_first:
            merged[first] = None


# --------------------------------------------------------------------------------------------- text
def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Give the end of a message about a name that does not exist: the nearest ones that do."""
    close = _close_names(name, known)
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f": there are {', '.join(known)}" if len(known) < 10 else ": see --help"


def _close_names(name: str, known: Sequence[str]) -> list[str]:
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return close
    # The right field in the wrong section, or without one.
    field = name.rpartition(".")[2]
    alike = [option for option in known if option.rpartition(".")[2] == field]
    if alike:
        return alike[:2]
    fields = {option.rpartition(".")[2]: option for option in known}
    return [
        fields[match]
        for match in difflib.get_close_matches(
            field,
            list(fields),
            n=1,
        )
    ]


def _shown(name: str, origin: str) -> str:
    """Write a setting's name as its source spells it."""
    return f"--{dashed(name)}" if origin == "command line" else f"{name} in {origin}"


def dashed(name: str) -> str:
    """Write a setting's name as the command line spells it."""
    return name.replace("_", "-")
