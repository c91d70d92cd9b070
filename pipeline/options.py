"""What settings and options may hold: paths with `~`, numbers within limits, names of files.

The models of settings and the command lines of all doors take their types from here, so that a
limit and its message are written once. A number without limits is a traceback for somebody: every
number has a lower and an upper one.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.errors import ConfigError
from pipeline.storage.uri import SCHEME, expand_home

A = TypeVar("A")

MAX_COUNT = 2**53
"""Above it a number is no longer exact as a float, which JSON readers and logs use."""
MAX_SIDE_PX = 65_535
"""Longest side of a JPEG."""
MAX_BATCH = 2**24
"""Images of a batch; far above any published run (2^16), and their ids still fit every cache."""
MAX_SEED = 2**63 - 1
MAX_TIMEOUT_S = 30 * 86_400.0
"""A month; process groups count their waits in 64-bit nanoseconds, which end after centuries."""


# -------------------------------------------------------------------------------------------- paths
def _expand_text(text: str) -> str:
    """Replace `~` at the start of a path; the URIs of object storage stay as they are.

    A shell does it only at the start of a word, so `--run.dir=~/x` and a path in a TOML file arrive
    as they were written. Done here, for settings and options alike, so that no part of the program
    sees a `~` which another part reads in another way.
    """
    if any(ord(letter) < 32 for letter in text):
        raise ValueError("a path without control characters was expected")
    return expand_home(text)


def _expand_local(text: str) -> str:
    """Expand a path that must be on this machine: a URI would become a folder called `s3:`."""
    found = SCHEME.match(text)
    if found is not None:
        raise ValueError(
            f"a local path was expected, and {found.group(0)} starts a URI: give a folder of this "
            "machine"
        )
    return _expand_text(text)


def _local_path(path: Path) -> Path:
    # Path makes `s3:/x` of `s3://x`, so the scheme is told by its colon alone.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(
            "a local path was expected, not a URI: give a folder of this machine"
        )
    return Path(_expand_text(str(path)))


Location = Annotated[str, AfterValidator(_expand_text)]
"""A path or URI as text; empty often means none."""
LocalText = Annotated[str, AfterValidator(_expand_local)]
"""A local path as text; empty often means none."""
LocalPath = Annotated[Path, AfterValidator(_local_path)]
"""A local path."""


def _ending(suffix: str) -> AfterValidator:
    """Make the check that a file's name ends as its content asks for."""

    def check(value: Any) -> Any:
        name = str(value)
        if name and Path(name).suffix.lower() != suffix:
            raise ValueError(
                f"the file will hold {suffix[1:].upper()}: give a name that ends in {suffix}, for "
                f"example {Path(name).with_suffix(suffix).name or f'out{suffix}'}"
            )
        return value

    return AfterValidator(check)


PngFile = Annotated[str, AfterValidator(_expand_local), _ending(".png")]
JsonFile = Annotated[str, AfterValidator(_expand_local), _ending(".json")]
TomlFile = Annotated[Path, AfterValidator(_local_path), _ending(".toml")]
MarkdownFile = Annotated[Path, AfterValidator(_local_path), _ending(".md")]

# ------------------------------------------------------------------------------------------ numbers
# An upper limit is far above what anybody needs, and below what overflows further on: it catches a
# digit too many, not an ambition.
Count = Annotated[
    int,
    Field(ge=1, le=MAX_COUNT),
]
"""At least one of something."""
CountOrOff = Annotated[
    int,
    Field(ge=0, le=MAX_COUNT),
]
"""A number of which 0 means none, off, or our choice."""
Pixels = Annotated[
    int,
    Field(ge=1, le=MAX_SIDE_PX),
]
"""A side of an image or a patch."""
BatchSize = Annotated[
    int,
    Field(ge=1, le=MAX_BATCH),
]
"""Images of a batch."""
Length = Annotated[
    float,
    Field(gt=0, le=1e6),
]
"""A number of epochs."""
Rate = Annotated[
    float,
    Field(ge=0, le=1e30),
]
"""A learning rate or a weight decay; above it the products are not finite in fp32."""
Factor = Annotated[
    float,
    Field(ge=0, le=1e9),
]
"""A plain measure of which 0 means off, or our choice."""
Area = Annotated[
    float,
    Field(ge=1e-6, le=1),
]
"""A part of an image's area; a millionth is one pixel of the largest photographs."""
Aspect = Annotated[
    float,
    Field(ge=0.001, le=1000),
]
"""Width divided by height."""
Parallel = Annotated[
    int,
    Field(ge=0, le=4096),
]
"""Processes or threads; 0 means our choice."""
Rounds = Annotated[
    int,
    Field(ge=1, le=1_000_000),
]
"""Repetitions of a measurement."""
Pictures = Annotated[
    int,
    Field(ge=1, le=4096),
]
"""Pictures on one sheet."""
Streams = Annotated[
    int,
    Field(ge=1, le=4096),
]
"""Requests at once."""
Megabytes = Annotated[
    float,
    Field(ge=0.001, le=1e6),
]
"""A size of files."""
Minutes = Annotated[
    float,
    Field(ge=0, le=43_200),
]
"""A length of time up to a month; 0 means our choice."""
Seed = Annotated[
    int,
    Field(ge=0, le=MAX_SEED),
]
"""Key of random choices."""
Share = Annotated[
    float,
    Field(ge=0, le=1),
]
"""A part of a whole."""
DaliDepth = Annotated[
    int,
    Field(ge=0, le=16),
]
"""Batches that DALI works on at once; 0 means our choice."""
Lanes = Annotated[
    int,
    Field(ge=1, le=2**20),
]
"""Pieces of an epoch's line of samples."""
Seconds = Annotated[
    float,
    Field(gt=0, le=MAX_TIMEOUT_S),
]
"""A length of time."""


# -------------------------------------------------------------------------------- the command lines
def check_arguments(given: A) -> A:
    """Check the options of a command against their types, and expand the paths among them.

    Args:
        given: dataclass of the command line, as parsed.

    Returns:
        The same with paths expanded.

    Raises:
        ConfigError: naming every option whose value is out of range or of the wrong kind.
    """
    assert dataclasses.is_dataclass(given)
    hints = typing.get_type_hints(type(given), include_extras=True)
    checked: dict[str, Any] = {}
    problems = []
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        try:
            checked[field.name] = _adapter(hints[field.name]).validate_python(value)
        except ValidationError as error:
            # Of a list every wrong item is told, of a union every kind: the first says enough.
            problems.append(_problem(field.name, error))
    if problems:
        raise ConfigError("; ".join(problems))
    return typing.cast("Callable[..., A]", type(given))(**checked)


def _adapter(hint: Any) -> TypeAdapter[Any]:
    # Neither inf nor nan is a length, a share or a size of anything.
    return TypeAdapter(
        hint, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    )


def _problem(name: str, error: ValidationError) -> str:
    details = error.errors()[0]
    option = "--" + name.replace("_", "-")
    text = details["msg"].removeprefix("Value error, ")
    text = text.replace("Input should be", "expected a value", 1)
    return f"{option} {details['input']}: {text[:1].lower()}{text[1:]}"
