"""Settings by dotted name, laid over each other: defaults, recipe, TOML file, command line."""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.storage.uri import expand_home
from train.config import RunConfig
from train.settings.checks import Settings

PROGRAM = "train.pretrain"
EITHER_OR = (
    ("train.steps", "train.epochs"),
    ("optim.warmup_steps", "optim.warmup_epochs"),
)
"""Pairs of which exactly one is given: a source that sets one unsets the other one of the sources
below it."""


# ------------------------------------------------------------------------------------------ sources
def flatten(nested: Mapping[str, Any], prefix: str = "") -> Settings:
    """Give the values of nested sections by dotted name."""
    flat: Settings = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner = flatten(value, f"{name}.")
            flat.update(inner)
        else:
            flat[name] = value
    return flat


def setting_types() -> dict[str, Any]:
    """Give the annotation of every setting by dotted name."""
    types: dict[str, Any] = {}
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        # A plain field, such as the recipe's name, is not a section.
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            continue
        # The fields' own annotations are strings: the files postpone their evaluation.
        hints = typing.get_type_hints(kind)
        for name in kind.model_fields:
            types[f"{section}.{name}"] = hints[name]
    return types


def read_toml(path: str, problems: list[str]) -> Settings:
    """Read a TOML file's values by dotted name; empty if it cannot be read, and `problems` says
    why.

    Args:
        path: local file; `~` is the home folder.
        problems: messages are appended here.

    Returns:
        The values whose type is that of their setting. Names that no setting has are kept for
        `merge`, which says so.
    """
    try:
        # Editors on Windows put a byte order mark first, which TOML does not know.
        local_path = Path(expand_home(path))
        text = local_path.read_text(encoding="utf-8-sig")
        nested = tomllib.loads(text)
    except FileNotFoundError:
        problems.append(f"--config {path}: no such file")
    except OSError as error:
        problems.append(f"--config {path}: cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        problems.append(f"--config {path}: not TOML: not in UTF-8 ({error.reason})")
    except tomllib.TOMLDecodeError as error:
        problems.append(f"--config {path}: not TOML: {error}")
    except (ValueError, RecursionError) as error:
        # An unknown ~user, or brackets within brackets by the thousand.
        problems.append(f"--config {path}: cannot be read: {error}")
    else:
        return _one_spelling_each(path, nested, problems)
    return {}


def _one_spelling_each(
    path: str, nested: Mapping[str, Any], problems: list[str]
) -> Settings:
    """Give a file's values by dotted name, with dashes as underscores; refuse a setting that is
    written in two ways."""
    types = setting_types()
    values: Settings = {}
    spellings: dict[str, str] = {}
    for written, value in _flatten_all(nested):
        # Dashes as on the command line are understood here too.
        name = written.replace("-", "_")
        if name in spellings:
            # TOML itself refuses a key that comes twice; which of two spellings counts is a guess.
            problems.append(
                f"{path} gives {name} twice, as {spellings[name]} and as {written}: keep one"
            )
            continue
        spellings[name] = written
        mistake = None
        if name in types:
            mistake = describe_wrong_type(value, types[name])
        if mistake is None:
            values[name] = value
        else:
            given = _as_toml(value)
            problems.append(f"{name} = {given} (from {path}): {mistake}")
    return values


def _flatten_all(
    nested: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Give the values of nested tables by dotted name as written, each of them."""
    for key, value in nested.items():
        is_section = not prefix and key in RunConfig.model_fields
        # An empty table is no setting of ours unless it is a section's, whose defaults it leaves.
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and (value or is_section):
            yield from _flatten_all(value, f"{name}.")
        else:
            yield name, value


def describe_wrong_type(value: Any, annotation: Any) -> str | None:
    """Say what is wrong if a file's value has another type than its setting; None if it has not.

    A file has types: `seed = true`, `seed = 1.0` and `seed = "3"` are mistakes, though each could
    be read as a number. What is not a plain value is left to the setting's own check.

    Args:
        value: as TOML gives it.
        annotation: type of the setting.
    """
    # A tuple is a list in TOML, and each of its items has a type.
    kinds = _kinds_of(annotation)
    items = value if isinstance(value, list) else [value]
    for item in items:
        expected = _expected(kinds)
        # Before whole numbers: to Python true is one of them.
        if isinstance(item, bool):
            if bool not in kinds:
                return f"{expected}, not true or false"
            continue
        if isinstance(item, float) and float not in kinds:
            return f"{expected}, not a number with a point"
        takes_numbers = int in kinds or float in kinds
        if isinstance(item, int) and not takes_numbers:
            return expected
        if isinstance(item, str) and str not in kinds and _reads_as_plain(item):
            return f"{expected}: write it without quotes"
    return None


def _kinds_of(annotation: Any) -> set[type]:
    """Give the plain types that a setting takes, within its unions, tuples and choices."""
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return {type(option) for option in options}
    if not options:
        return {annotation}
    kinds: set[type] = set()
    for option in options:
        kinds |= _kinds_of(option)
    return kinds


def _reads_as_plain(text: str) -> bool:
    """Tell whether a text is a number or a truth value in quotes."""
    if text.strip().lower() in ("true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _expected(kinds: set[type]) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text in quotes",
    }
    # `float` takes whole numbers too, so the wider word says both.
    named = [word for kind, word in words.items() if kind in kinds]
    if int in kinds and float in kinds:
        named.remove(words[int])
    choice = " or ".join(named)
    return f"expected {choice}"


def _as_toml(value: Any) -> str:
    """Write a value as the file has it, for a message."""
    return json.dumps(value, default=str, ensure_ascii=False)


def default_values() -> Settings:
    """Give every default but the view's size, which follows the model's."""
    defaults = RunConfig()
    sections = defaults.model_dump(exclude={"recipe"})
    values = flatten(sections)
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
            elif name == "recipe":
                problems += _recipe_problems(value, origin, layers)
            else:
                hint = did_you_mean(name, list(known))
                problems.append(f"unknown setting {_shown(name, origin)}{hint}")
        _unset_others(values, merged)
    return merged, origins


def _recipe_problems(
    value: Any, origin: str, layers: Sequence[tuple[str, Settings]]
) -> list[str]:
    """Refuse a recipe that a file names unless it is the one in use: a file cannot choose it."""
    names = [name for name, _ in layers]
    if f"recipe {value}" in names:
        return []
    return [
        f"recipe = {value!r} in {origin}: the recipe is the first word of the command line, "
        f"train.pretrain {value}: leave it out of the file"
    ]


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
        choice = " or ".join(close)
        return f": did you mean {choice}?"
    # A list of a hundred names would hide the mistake.
    if len(known) >= 10:
        return ": see --help"
    names = ", ".join(known)
    return f": there are {names}"


def _close_names(name: str, known: Sequence[str]) -> list[str]:
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return close
    # The right field in the wrong section, or without one.
    field = _field_of(name)
    alike = [option for option in known if _field_of(option) == field]
    if alike:
        return alike[:2]
    # And a misspelt field in the wrong section.
    fields = {_field_of(option): option for option in known}
    matches = difflib.get_close_matches(field, list(fields), n=1)
    return [fields[match] for match in matches]


def _field_of(name: str) -> str:
    """Return a setting's name without its section."""
    _, _, field = name.rpartition(".")
    return field


def _shown(name: str, origin: str) -> str:
    """Write a setting's name as its source spells it."""
    if origin == "command line":
        return f"--{dashed(name)}"
    return f"{name} in {origin}"


def dashed(name: str) -> str:
    """Write a setting's name as the command line spells it."""
    return name.replace("_", "-")
