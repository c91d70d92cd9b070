"""Settings at random, drawn from the models: sensible values, values at the edge, and nonsense."""

from __future__ import annotations

import types
import typing
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from train.config import RunConfig

INTEGERS = ["-1", "0", "1", "2", "3", "4", "7", "8", "16", "64", "1.5", "9" * 30]
FLOATS = [
    "-1",
    "0",
    "1e-9",
    "1e-3",
    "0.1",
    "0.5",
    "0.75",
    "1",
    "1.5",
    "3",
    "nan",
    "inf",
    "1e400",
]
TEXTS = ["", "x", "🙂", "a b"]
SIZES = ["16", "32", "48", "16x48", "48,32", "31", "0", "64x64x64", "x"]
FIXED = {"run.dir", "data.train", "data.val", "checkpoint.dir"}
"""Where a test's files lie; tests/unit/test_settings_sources.py has their cases."""


def list_settings() -> dict[str, Any]:
    """Give the type of every setting by dotted name, from the models."""
    found: dict[str, Any] = {}
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            hints = typing.get_type_hints(kind)
            found |= {f"{section}.{name}": hints[name] for name in kind.model_fields}
    return {name: kind for name, kind in found.items() if name not in FIXED}


def words_for(kind: Any) -> list[str]:
    """List what might be written for a setting of a type."""
    origin = typing.get_origin(kind)
    options = typing.get_args(kind)
    if origin is typing.Literal:
        return [*(str(option) for option in options), "nonsense"]
    if any(typing.get_origin(option) is tuple for option in options):
        return SIZES
    if origin in (typing.Union, types.UnionType):
        return ["none", *(word for option in options for word in words_for(option))]
    return {
        bool: ["true", "false", "maybe"],
        int: INTEGERS,
        float: FLOATS,
        str: TEXTS,
        types.NoneType: [],
    }[kind]


@st.composite
def some_settings(
    draw: st.DrawFn, *, without: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Draw one to four settings with a word for each."""
    known = list_settings()
    names = sorted(known.keys() - without)
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    return {name: draw(st.sampled_from(words_for(known[name]))) for name in chosen}
