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
from train.process.place import world_size_of
from train.recipes import RECIPES
from train.settings.checks import Settings, build_config
from train.settings.layers import (
    _dashed,
    _did_you_mean,
    _read_toml,
    default_values,
    flatten,
    merge,
    setting_types,
)


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
    """Read a command line into settings and what to do with them; arguments and errors as
    `parse_run`."""
    words = _split_words(argv)
    if words.wants_help:
        from train.settings.text import help_text

        raise HelpRequested(help_text(words.recipe if words.recipe in RECIPES else None))
    problems = list(words.problems)
    layers = [("defaults", default_values())]
    if words.recipe is None:
        problems.append(f"no recipe given: name one of {', '.join(RECIPES)} first")
    elif words.recipe not in RECIPES:
        problems.append(
            f"unknown recipe {words.recipe!r}{_did_you_mean(words.recipe, list(RECIPES))}"
        )
    else:
        layers.append((f"recipe {words.recipe}", flatten(RECIPES[words.recipe])))
    if words.toml_path is not None:
        layers.append((words.toml_path, _read_toml(words.toml_path, problems)))
    layers.append(("command line", _parse_values(words.settings, problems)))
    merged, origins = merge(layers, problems)
    merged["recipe"] = words.recipe or "custom"
    config = build_config(merged, origins, problems, world_size=world_size_of(env or os.environ))
    if config.data.train == "" and words.action == "run":
        problems.append(
            "data.train is not set: give the URI of the training shards, --data.train FOLDER"
        )
    if problems:
        raise ConfigError(_report(problems))
    return Command(config, words.action)


# -------------------------------------------------------------------------------------------- words
@dataclasses.dataclass
class _Words:
    recipe: str | None = None
    toml_path: str | None = None
    action: Literal["run", "dry-run"] = "run"
    wants_help: bool = False
    settings: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def _split_words(argv: Sequence[str]) -> _Words:
    """Sort the words of a command line into recipe, options and settings, without judging the
    settings."""
    words, rest = _Words(), list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") and word != "-h":
            if words.recipe is None:
                words.recipe = word
            else:
                words.problems.append(
                    f"unexpected word {word!r}: settings are written --section.field value"
                )
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
        values[name] = (
            text if annotation is None or text is None else _parse_value(text, annotation)
        )
    return values


def _parse_value(text: str, annotation: Any) -> Any:
    """Read one word as the type of its setting; left as it is where it does not read so (validation
    then says why)."""
    options = typing.get_args(annotation)
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    if typing.get_origin(annotation) is Literal:
        return next((option for option in options if str(option) == text), text)
    if typing.get_origin(annotation) in (tuple, list) or any(
        typing.get_origin(o) is tuple for o in options
    ):
        parts = [part for part in re.split(r"[,x]", text.strip("()[] ")) if part]
        return [_number(part) for part in parts] if len(parts) > 1 else _number(text)
    return text


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return text


def _describe(annotation: Any) -> str:
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return " | ".join(str(option) for option in options)
    return " or ".join(_describe(option) for option in options) or getattr(
        annotation, "__name__", str(annotation)
    )


def _report(problems: Sequence[str]) -> str:
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return unique[0]
    return f"{len(unique)} mistakes in the settings:\n" + "\n".join(
        f"  - {problem}" for problem in unique
    )
