"""The command line of a run: recipe, then TOML file, then dotted settings; every mistake reported
at once.

Imports no torch, so that a mistake is reported in well under two seconds and before any process is
started.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipeline.errors import ConfigError
from train.config import RunConfig
from train.process.place import name_world_source, world_size_of
from train.recipes import RECIPES
from train.settings.checks import Settings, build_config
from train.settings.devices import find_device
from train.settings.engine_rules import machine_problems
from train.settings.layers import (
    dashed,
    default_values,
    did_you_mean,
    flatten,
    merge,
    read_toml,
    setting_types,
)
from train.settings.resume_rules import accept_problems


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    config: RunConfig
    action: Literal["run", "dry-run"] = "run"


class HelpRequested(Exception):  # noqa: N818 - not an error: the help was asked for
    """Raised in place of a run if `--help` is on the command line; carries the text."""


def parse_run(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None
) -> RunConfig:
    """Build the settings of a run from a command line.

    Args:
        argv: `RECIPE [--config run.toml] [--section.field value ...]`, without the program's name.
        env: the launcher's environment; the process's own by default.

    Returns:
        The checked settings.

    Raises:
        ConfigError: naming every mistake of every source.
        HelpRequested: `--help` was given.
    """
    return parse_command(argv, env=env).config


def parse_command(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None
) -> Command:
    """Read a command line into settings and what to do with them; arguments and errors as
    `parse_run`."""
    env = os.environ if env is None else env
    words = _split_words(argv)
    if words.wants_help:
        # Imported here: the texts of all settings are read only if somebody asks for them.
        from train.settings.text import help_text

        # A recipe that does not exist is no reason to refuse help.
        recipe = words.recipe if words.recipe in RECIPES else None
        text = help_text(recipe)
        raise HelpRequested(text)

    # One list for the mistakes of all sources: a user should not have to start once per mistake.
    problems = list(words.problems)
    layers = _layers(words, problems)
    merged, origins = merge(layers, problems)
    merged["recipe"] = words.recipe or "custom"
    # A dry run may be of a run for another machine: it notes what this one could not do.
    is_run = words.action == "run"
    device = None
    if is_run:
        device = find_device(env)
    world_size = world_size_of(env)
    world_source = name_world_source(env)
    config = build_config(
        merged,
        origins,
        problems,
        world_size=world_size,
        world_source=world_source,
        device=device,
    )
    if is_run:
        problems += machine_problems(config)
    problems += accept_problems(config.resume.accept)
    # As given, not as checked: a section with a mistake holds its defaults.
    has_data = bool(merged.get("data.train"))
    if is_run and not has_data:
        problems.append(
            "data.train is not set: give the URI of the training shards, --data.train FOLDER"
        )
    if problems:
        raise ConfigError(_report(problems))
    return Command(config, words.action)


def _layers(words: _Words, problems: list[str]) -> list[tuple[str, Settings]]:
    """Give the sources of settings, the weakest first."""
    layers = [("defaults", default_values())]
    recipe = words.recipe
    known = list(RECIPES)
    if recipe is None:
        problems.append(f"no recipe given: name one of {', '.join(known)} first")
    elif recipe not in RECIPES:
        hint = did_you_mean(recipe, known)
        problems.append(f"unknown recipe {recipe!r}{hint}")
    else:
        of_recipe = flatten(RECIPES[recipe])
        layers.append((f"recipe {recipe}", of_recipe))
    # In the order given: a later file wins over an earlier one.
    for path in words.toml_paths:
        of_file = read_toml(path, problems)
        layers.append((path, of_file))
    of_command_line = _parse_values(words.settings, problems)
    layers.append(("command line", of_command_line))
    return layers


# -------------------------------------------------------------------------------------------- words
@dataclasses.dataclass
class _Words:
    recipe: str | None = None
    toml_paths: list[str] = dataclasses.field(default_factory=list)
    action: Literal["run", "dry-run"] = "run"
    wants_help: bool = False
    settings: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def _split_words(argv: Sequence[str]) -> _Words:
    """Sort the words of a command line into recipe, options and settings, without judging the
    settings."""
    words = _Words()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not _is_option(word) and not word.startswith("--"):
            _keep_word(words, word)
            continue
        name, has_value, given = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word == "-h" or name == "help":
            words.wants_help = True
        elif name == "dry_run":
            words.action = "dry-run"
            if has_value:
                words.problems.append(
                    f"--dry-run takes no value, not {given!r}: leave it out"
                )
        else:
            value: str | None = given if has_value else None
            if not has_value and rest and not _is_option(rest[0]):
                value = rest.pop(0)
            _keep_option(words, name, value)
    return words


def _is_option(word: str) -> bool:
    # A letter after the dashes: `-1` and `--1` are values.
    if word == "-h":
        return True
    return re.match(r"--[A-Za-z]", word) is not None


def _keep_word(words: _Words, word: str) -> None:
    if words.recipe is None:
        words.recipe = word
        return
    hint = ""
    if word.endswith((".tar", ".beton")):
        hint = ". If the shell has expanded a pattern, put it in quotes: 'data/train-*.tar'"
    words.problems.append(
        f"unexpected word {word!r}: settings are written --section.field value{hint}"
    )


def _keep_option(
    words: _Words,
    name: str,
    value: str | None,
) -> None:
    # The deepspeed launcher adds it; the environment says the same.
    if name == "local_rank":
        return
    if name != "config":
        words.settings.append((name, value))
        return
    if not value:
        words.problems.append("--config needs the path of a TOML file")
    else:
        words.toml_paths.append(value)


def _parse_values(
    settings: Sequence[tuple[str, str | None]], problems: list[str]
) -> Settings:
    """Turn the command line's words into values, as far as the settings' types say how."""
    types = setting_types()
    values: Settings = {}
    for name, text in settings:
        # `--section.no-flag` switches a flag off, unless a setting of that very name exists.
        positive = name.replace(".no_", ".", 1)
        is_flag = types.get(positive) is bool
        is_alone = text is None
        if name not in types and is_flag and is_alone:
            values[positive] = False
            continue
        annotation = types.get(name)
        if annotation is None:
            # Unknown; `merge` says so, with its nearest relatives.
            values[name] = text
        elif text is not None:
            values[name] = _parse_value(text, annotation)
        elif annotation is bool:
            values[name] = _parse_value("true", annotation)
        else:
            problems.append(f"--{dashed(name)} needs a value ({_describe(annotation)})")
    return values


def _parse_value(text: str, annotation: Any) -> Any:
    """Read one word as the type of its setting; a word that does not read so stays as it is, and
    validation says why."""
    options = typing.get_args(annotation)
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    origin = typing.get_origin(annotation)
    if origin is Literal:
        # By text: the options of a Literal may be numbers.
        for option in options:
            if str(option) == text:
                return option
        return text
    origins_of_options = [typing.get_origin(option) for option in options]
    holds_tuple = tuple in origins_of_options
    if origin not in (tuple, list) and not holds_tuple:
        return text
    # 224x224, 224,224 and (224, 224) are one size.
    inner = text.strip("()[] ")
    parts = [part for part in re.split(r"[,x]", inner) if part]
    if len(parts) > 1:
        return [_number(part) for part in parts]
    return _number(text)


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return text


def _describe(annotation: Any) -> str:
    """Write a type as a user reads it: `none | cpu`, `int or None`."""
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        values = [str(option) for option in options]
        return " | ".join(values)
    if options:
        kinds = [_describe(option) for option in options]
        return " or ".join(kinds)
    # A type has a name; what has none is written as Python shows it.
    shown = str(annotation)
    return getattr(annotation, "__name__", shown)


def _report(problems: Sequence[str]) -> str:
    # Two sections may find the same mistake.
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return unique[0]
    lines = [f"  - {problem}" for problem in unique]
    return "\n".join([f"{len(unique)} mistakes in the settings:", *lines])
