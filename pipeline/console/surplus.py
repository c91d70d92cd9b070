"""Words that a command has no place for: most often a pattern that the shell has expanded."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError

_MOST_SHOWN = 3
"""Words that a message repeats: a pattern may stand for thousands of files."""


def refuse_surplus(arguments: type[Any], args: Sequence[str] | None) -> None:
    """Refuse more words than a command takes, and say that a pattern belongs in quotes.

    Args:
        arguments: Dataclass of the command line.
        args: Words after the program's name. None: the process's own.

    Raises:
        ConfigError: There are more words than the command has places for.
    """
    import tyro

    hints = typing.get_type_hints(arguments, include_extras=True)
    places: list[str] = []
    flags: set[str] = set()
    for field in dataclasses.fields(arguments):
        hint = hints[field.name]
        metadata = getattr(hint, "__metadata__", ())
        plain = hint.__origin__ if metadata else hint
        if typing.get_origin(plain) in (list, tuple, dict) or dataclasses.is_dataclass(
            plain
        ):
            return  # its option takes any number of words: they cannot be told apart here
        if tyro.conf.Positional in metadata:
            places.append(field.name.upper())
        elif plain is bool:
            flags.add(field.name)

    words = _plain_words(sys.argv[1:] if args is None else args, flags)
    if not places or len(words) <= len(places):
        return
    shown = " ".join(words[:_MOST_SHOWN]) + (" ..." if len(words) > _MOST_SHOWN else "")
    raise ConfigError(
        f"expected {' '.join(places)}, got {len(words):,} words: {shown}. If the shell has "
        "expanded a pattern, put it in quotes, for example 'data/train-*.tar'; a list of files is "
        "one word with commas."
    )


def _plain_words(words: Sequence[str], flags: set[str]) -> list[str]:
    """Return the words that are neither an option nor an option's value."""
    plain: list[str] = []
    is_value = False
    for word in words:
        if is_value:
            is_value = False
        elif word.startswith("-"):
            name = word.lstrip("-").replace("-", "_")
            is_value = (
                "=" not in word and name not in flags and name not in ("h", "help")
            )
        else:
            plain.append(word)
    return plain
