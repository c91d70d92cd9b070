"""The command line of a run: recipe, then TOML file, then dotted settings; every mistake reported at once.

Imports no torch, so that a mistake is reported in well under two seconds and before any process is started.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pipeline.errors import ConfigError
from train.checks import Settings, build_config, world_size_of
from train.config import RunConfig
from train.recipes import RECIPES

PROGRAM = "train.pretrain"

EITHER_OR = (("train.steps", "train.epochs"), ("optim.warmup_steps", "optim.warmup_epochs"))
"""Pairs of which exactly one is given: a source that sets one unsets the other one of the sources below it."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    config: RunConfig
    action: Literal["run", "dry-run"] = "run"


class HelpRequested(Exception):  # noqa: N818 - not an error: the help was asked for
    """Raised in place of a run where `--help` is on the command line; carries the text."""


def parse_run(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> RunConfig:
    """Build the settings of a run from a command line.

    Args:
        argv: `RECIPE [--config run.toml] [--section.field value ...]`, without the program's name.
        env: environment to read `WORLD_SIZE` from; the process's own by default.

    Returns:
        The checked settings.

    Raises:
        ConfigError: naming every mistake of every source.
        HelpRequested: where `--help` is given.
    """
    return parse_command(argv, env=env).config


def parse_command(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Command:
    """Read a command line into settings and what to do with them; arguments and errors as `parse_run`."""
    words = _split_words(argv)
    if words.wants_help:
        from train.settings_text import help_text

        raise HelpRequested(help_text(words.recipe if words.recipe in RECIPES else None))
    problems = list(words.problems)
    layers = [("defaults", default_values())]
    if words.recipe is None:
        problems.append(f"no recipe given: name one of {', '.join(RECIPES)} first")
    elif words.recipe not in RECIPES:
        problems.append(f"unknown recipe {words.recipe!r}{_did_you_mean(words.recipe, list(RECIPES))}")
    else:
        layers.append((f"recipe {words.recipe}", flatten(RECIPES[words.recipe])))
    if words.toml_path is not None:
        layers.append((words.toml_path, _read_toml(words.toml_path, problems)))
    layers.append(("command line", _parse_values(words.settings, problems)))
    merged, origins = merge(layers, problems)
    merged["recipe"] = words.recipe or "custom"
    config = build_config(merged, origins, problems, world_size=world_size_of(env or os.environ))
    if config.data.train == "" and words.action == "run":
        problems.append("data.train is not set: give the URI of the training shards, --data.train FOLDER")
    if problems:
        raise ConfigError(_report(problems))
    return Command(config, words.action)


# ------------------------------------------------------------------------------------------------ words


@dataclasses.dataclass
class _Words:
    recipe: str | None = None
    toml_path: str | None = None
    action: Literal["run", "dry-run"] = "run"
    wants_help: bool = False
    settings: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def _split_words(argv: Sequence[str]) -> _Words:
    """Sort the words of a command line into recipe, options and settings, without judging the settings."""
    words, rest = _Words(), list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") and word != "-h":
            if words.recipe is None:
                words.recipe = word
            else:
                words.problems.append(f"unexpected word {word!r}: settings are written --section.field value")
            continue
        name, has_value, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word == "-h" or name == "help":
            words.wants_help = True
        elif name == "dry_run":
            words.action = "dry-run"
        else:
            if not has_value:
                value = rest.pop(0) if rest and not _is_option(rest[0]) else None  # type: ignore[assignment]
            _keep_option(words, name, value)
    return words


def _is_option(word: str) -> bool:
    return re.match(r"--[A-Za-z]", word) is not None or word == "-h"


def _keep_option(words: _Words, name: str, value: str | None) -> None:
    if name == "local_rank":  # added by the deepspeed launcher; the environment says the same
        return
    if name == "config":
        if value is None:
            words.problems.append("--config needs the path of a TOML file")
        words.toml_path = value
    else:
        words.settings.append((name, value))


# ------------------------------------------------------------------------------------------------ sources


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
            types.update({f"{section}.{name}": hints[name] for name in field.annotation.model_fields})
    return types


def _read_toml(path: str, problems: list[str]) -> Settings:
    try:
        with Path(path).open("rb") as file:
            return {name.replace("-", "_"): value for name, value in flatten(tomllib.load(file)).items()}
    except FileNotFoundError:
        problems.append(f"--config {path}: no such file")
    except OSError as error:
        problems.append(f"--config {path}: cannot be read: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"--config {path}: not TOML: {error}")
    return {}


def _parse_values(settings: Sequence[tuple[str, str | None]], problems: list[str]) -> Settings:
    """Turn the command line's words into values, as far as the settings' types say how."""
    types = setting_types()
    values: Settings = {}
    for given, given_text in settings:
        positive = given.replace(".no_", ".", 1)
        if given not in types and types.get(positive) is bool and given_text is None:
            values[positive] = False
            continue
        name, text = given, given_text
        annotation = types.get(name)
        if text is None and annotation is bool:
            text = "true"
        if text is None and annotation is not None:
            problems.append(f"--{_dashed(name)} needs a value ({_describe(annotation)})")
            continue
        values[name] = text if annotation is None or text is None else _parse_value(text, annotation)
    return values


def _parse_value(text: str, annotation: Any) -> Any:
    """Read one word as the type of its setting; left as it is where it does not read so (validation then says why)."""
    options = typing.get_args(annotation)
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    if typing.get_origin(annotation) is Literal:
        return next((option for option in options if str(option) == text), text)
    if typing.get_origin(annotation) in (tuple, list) or any(typing.get_origin(o) is tuple for o in options):
        parts = [part for part in re.split(r"[,x]", text.strip("()[] ")) if part]
        return [_number(part) for part in parts] if len(parts) > 1 else _number(text)
    return text


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return text


def default_values() -> Settings:
    """Give every default but the view's size, which follows the model's."""
    values = flatten(RunConfig().model_dump(exclude={"recipe"}))
    return {name: value for name, value in values.items() if name not in ("view.height", "view.width")}


def merge(layers: Sequence[tuple[str, Settings]], problems: list[str]) -> tuple[Settings, dict[str, str]]:
    """Lay the sources over each other, the later ones on top; report the names that no setting has."""
    known = setting_types()
    merged: Settings = {}
    origins: dict[str, str] = {}
    for origin, values in layers:
        for name, value in values.items():
            if name not in known:
                if name != "recipe":
                    problems.append(f"unknown setting {_shown(name, origin)}{_did_you_mean(name, list(known))}")
                continue
            merged[name] = value
            if origin != "defaults":
                origins[name] = origin
        for pair in EITHER_OR:
            given = [name for name in pair if values.get(name) is not None]
            if len(given) == 1:
                merged[pair[1 - pair.index(given[0])]] = None
    return merged, origins


# ------------------------------------------------------------------------------------------------ text


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if not close:  # the right field in the wrong section, or without one
        field = name.rpartition(".")[2]
        close = [option for option in known if option.rpartition(".")[2] == field][:2]
    if not close:
        fields = {option.rpartition(".")[2]: option for option in known}
        close = [fields[match] for match in difflib.get_close_matches(name.rpartition(".")[2], list(fields), n=1)]
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f": there are {', '.join(known)}" if len(known) < 10 else ": see --help"


def _shown(name: str, origin: str) -> str:
    return f"--{_dashed(name)}" if origin == "command line" else f"{name} in {origin}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _describe(annotation: Any) -> str:
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(option) for option in options)
    return " or ".join(_describe(option) for option in options) or getattr(annotation, "__name__", str(annotation))


def _report(problems: Sequence[str]) -> str:
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return unique[0]
    return f"{len(unique)} mistakes in the settings:\n" + "\n".join(f"  - {problem}" for problem in unique)
