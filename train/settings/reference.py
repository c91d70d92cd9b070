"""Write docs/configuration.md from the settings' models: `python -m train.settings.reference`.

The page is never edited by hand: `--check` fails if it differs from what the models say, and so
does a unit test. Imports no torch.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.settings.reference")

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline import storage
from pipeline.console import run_command
from pipeline.convert.settings import OPTION_NAMES, ConvertSettings
from pipeline.errors import ConfigError
from pipeline.options import MAX_COUNT
from train.config import RunConfig
from train.recipes import RECIPES
from train.settings.checks import build_config
from train.settings.layers import default_values, flatten, merge
from train.settings.resume_rules import RULES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
COMMAND = "python -m train.settings.reference"
_UNITS = (
    ("_gib", "GiB"),
    ("_bytes", "bytes"),
    ("_tflops", "10^12 operations/s"),
    ("timeout_s", "seconds"),
    ("_minutes", "minutes"),
    ("every_steps", "steps"),
    ("_steps", "steps"),
    ("steps", "steps"),
    ("epochs", "epochs"),
    ("batch_size", "images"),
    ("prefetch_batches", "micro-batches"),
    ("keep_every", "steps"),
    ("keep_last", "checkpoints"),
    ("num_threads", "threads"),
    ("num_pictures", "images"),
    ("lanes", "lanes"),
    ("window", "shards"),
    ("dali_depth", "batches"),
    ("depth", "blocks"),
    ("num_heads", "heads"),
    ("embed_dim", "values"),
    ("skipped_in_a_row", "steps"),
    ("bad_in_a_row", "samples"),
    ("samples_per_shard", "images"),
    ("limit", "images"),
    ("pixels", "pixels"),
    ("image_size", "pixels"),
    ("patch_size", "pixels"),
    ("height", "pixels"),
    ("width", "pixels"),
    ("resize", "pixels"),
    ("max_resolution", "pixels"),
    ("_area", "share, 0 to 1"),
    ("_share", "share, 0 to 1"),
    ("mask_ratio", "share, 0 to 1"),
    ("hw_decoder_load", "share, 0 to 1"),
    ("flip_probability", "share, 0 to 1"),
)
"""Unit of a setting by the ending of its name; the first that fits counts."""
_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Arguments:
    """Write docs/configuration.md from the settings' models."""

    check: bool = False
    """Write nothing; end with exit code 2 if the page differs from the models."""


def render() -> str:
    """Return the whole page."""
    parts = [_HEAD]
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        # Not the class's own defaults: a run's default length is in RunConfig.
        defaults = field.get_default()
        parts.append(f"### `[{section}]`\n\n{_summary(model)}\n")
        names = {name: f"{section}.{name}" for name in model.model_fields}
        values = {name: getattr(defaults, name) for name in model.model_fields}
        parts.append(_table(model, names, values, rules=RULES))
    parts += [_RECIPES, _recipe_table(), _CONVERT, _convert_table()]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------- tables
def _table(
    model: type[BaseModel],
    names: Mapping[str, str],
    defaults: Mapping[str, Any],
    *,
    rules: Mapping[str, str] | None = None,
) -> str:
    """Lay out one model: a row per setting.

    Args:
        model: the settings.
        names: what a user types for each field.
        defaults: value of each field if it is not given.
        rules: what a resume does about another value, by what a user types; None for settings of a
            command that is not resumed.
    """
    columns = ["setting", "type", "default", "unit", "meaning"]
    if rules is not None:
        columns.insert(4, "at a resume")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    help_texts = field_help(model)
    for name in model.model_fields:
        kind = describe_type(model, name)
        if not kind:  # a nested model, which has no value of its own
            continue
        cells = [
            f"`{names[name]}`",
            kind,
            _shown(defaults[name]),
            unit_of(name),
            help_texts[name],
        ]
        if rules is not None:
            cells.insert(4, rules[names[name]])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _convert_table() -> str:
    """Lay out the settings of a conversion under the names of the command line."""
    names = {}
    for name in ConvertSettings.model_fields:
        option = OPTION_NAMES.get(name, name)
        names[name] = f"--{option.replace('_', '-')}"
    # The defaults as they are written: 256MB says more than 256000000.
    fields = ConvertSettings.model_fields.items()
    return _table(
        ConvertSettings,
        names,
        {name: field.default for name, field in fields},
    )


def _recipe_table() -> str:
    """Lay out the settings in which any recipe differs from the defaults."""
    plain = default_values()
    by_recipe = {name: _values_of(name) for name in RECIPES}
    names = " | ".join(f"`{name}`" for name in RECIPES)
    rows = [f"| setting | default | {names} |", "|---" * (len(RECIPES) + 2) + "|"]
    # `plain` leaves out the view's size: it follows the model's and has no default to differ from.
    for setting, default in plain.items():
        values = [by_recipe[name][setting] for name in RECIPES]
        if any(value != default for value in values):
            cells = " | ".join(_shown(value) for value in values)
            rows.append(f"| `{setting}` | {_shown(default)} | {cells} |")
    return "\n".join(rows) + "\n"


def _values_of(recipe: str) -> dict[str, Any]:
    problems: list[str] = []
    layers = [("defaults", default_values()), ("recipe", flatten(RECIPES[recipe]))]
    values, _ = merge(layers, problems)
    config = build_config(
        {**values, "recipe": recipe},
        {},
        problems,
        world_size=1,
    )
    if problems:
        raise ConfigError(f"recipe {recipe}: {'; '.join(problems)}")
    return flatten(config.model_dump(exclude={"recipe"}))


# ------------------------------------------------------------------------------------------- fields
def field_help(model: type[BaseModel]) -> dict[str, str]:
    """Return the text under each field of a model, its bases' included, as one line.

    Raises:
        ConfigError: a field has no text.
    """
    texts: dict[str, str] = {}
    # From the oldest base down, so that a class may explain a field anew.
    for base in reversed(model.__mro__):
        if (
            isinstance(base, type)
            and issubclass(base, BaseModel)
            and base is not BaseModel
        ):
            texts |= _own_help(base)
    missing = [name for name in model.model_fields if name not in texts]
    if missing:
        raise ConfigError(
            f"{model.__name__}: no help under {', '.join(missing)}; write one"
        )
    return texts


def _own_help(model: type[BaseModel]) -> dict[str, str]:
    """Read the strings that stand under the fields in the source of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    (definition,) = tree.body
    assert isinstance(definition, ast.ClassDef), "the source of a class is a class"
    texts: dict[str, str] = {}
    for statement, following in zip(
        definition.body,
        definition.body[1:],
        strict=False,
    ):
        if not (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
        ):
            continue
        if isinstance(following, ast.Expr) and isinstance(
            following.value, ast.Constant
        ):
            # A table's cell is one line, and a bar would end it.
            text = " ".join(str(following.value.value).split())
            texts[statement.target.id] = text.replace("|", "\\|")
    return texts


def describe_type(model: type[BaseModel], name: str) -> str:
    """Describe the values that a field takes: its choices, or its type and limits; empty for a
    nested model."""
    annotation = model.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ""
    words = " or ".join(_type_words(annotation))
    limits = [
        f"{sign} {_plain(getattr(item, key))}"
        for item in _limits_of(model.model_fields[name])
        for key, sign in _SIGNS
        # The largest count says no more than "any number".
        if getattr(item, key, None) not in (None, MAX_COUNT)
    ]
    return f"{words} {', '.join(_short(limit) for limit in limits)}".strip()


def _plain(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _limits_of(field: FieldInfo) -> list[Any]:
    """Give the limits of a field, also those that stand within a union."""
    limits = list(field.metadata)
    for option in typing.get_args(field.annotation):
        for item in getattr(option, "__metadata__", ()):
            limits += getattr(item, "metadata", [])
    return limits


def _type_words(annotation: Any) -> list[str]:
    origin = typing.get_origin(annotation)
    options = typing.get_args(annotation)
    if origin is Literal:
        return [f"`{option}`" for option in options]
    if origin in (typing.Union, types.UnionType):
        return [word for option in options for word in _type_words(option)]
    if origin is typing.Annotated:
        return _type_words(options[0])
    if origin is tuple:
        return [f"{len(options)} x {_type_words(options[0])[0]}"]
    if annotation is types.NoneType:
        return ["none"]
    names = {
        "str": "text",
        "float": "number",
        "int": "whole number",
        "bool": "yes/no",
        "ByteSize": "size",
    }
    plain = getattr(annotation, "__name__", str(annotation))
    return [names.get(plain, plain)]


def _short(limit: str) -> str:
    """Write the limits of 64-bit numbers as powers; 20 digits say less."""
    for power in (63, 64):
        limit = limit.replace(str(2**power - 1), f"2^{power} - 1").replace(
            str(2**power), f"2^{power}"
        )
    return limit


def unit_of(name: str) -> str:
    """Return the unit of a setting, by the ending of its name; empty for a plain number or text."""
    return next((unit for ending, unit in _UNITS if name.endswith(ending)), "")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    if isinstance(value, float):
        return f"`{value:.6g}`"
    return f"`{value}`" if value != "" else "empty"


def _summary(model: type[BaseModel]) -> str:
    """Return the first paragraph of a class's docstring."""
    text = inspect.getdoc(model) or ""
    return re.sub(r"\s+", " ", text.split("\n\n")[0])


# --------------------------------------------------------------------------------------------- text
_HEAD = f"""# Settings

`{COMMAND}` writes this page from the models in `train/config.py`, `model/config.py`,
`pipeline/config.py` and `pipeline/convert/settings.py`. Change the help there, then run the
command. `make check` fails if the page is stale.

## Pre-training

`python -m train.pretrain RECIPE` takes its settings from four sources. A later one wins:

1. the defaults on this page;
2. the recipe, e.g. `mae_vit_b_16` (see [what the recipes set](#what-the-recipes-set));
3. a TOML file, `--config run.toml`, with one table per section; of several, a later one wins;
4. the command line, `--section.field value`. Dashes and underscores are the same there.

```toml
[train]
epochs = 400
global_batch_size = 2048

[engine]
zero_stage = 2
```

```
python -m train.pretrain mae_vit_b_16 --config run.toml --train.global-batch-size 1024
```

`--dry-run` prints all settings as TOML and ends. Unknown names are refused with a suggestion, and
all mistakes are reported at once with exit code 2 before any process starts. Setting one of
`train.steps` and `train.epochs`, or one of `optim.warmup_steps` and `optim.warmup_epochs`, unsets
the other one.

The column "at a resume" says what a start does whose value differs from that of the checkpoint it
goes on from. `defines`: it is refused, with both values; `--resume.accept NAME,...` takes the new
values and writes that down. The settings of the model's shape cannot be accepted, because the saved
weights have that shape. `may change`: the run goes on, and one line names the change. `free`: the
setting changes no number of a run.
"""
_RECIPES = """## What the recipes set

Only the settings in which a recipe differs from the defaults. `view.height` and `view.width` follow
`model.image_size`.
"""
_CONVERT = """## Conversion

`python -m pipeline.convert SRC DST` takes these on the command line. Sizes may have a unit: `KB`,
`MB`, `GB`, `KiB`, `MiB`, `GiB`. `--help` also lists the options that do not shape the result:
workers, engine, dry run and output.
"""


def _run(arguments: Arguments) -> int:
    text = render()
    if arguments.check:
        written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if written != text:
            raise ConfigError(
                f"{PAGE} differs from the settings' models: run {COMMAND}"
            )
        return 0
    storage.write_atomic(str(PAGE), text.encode())
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(
        _run,
        Arguments,
        args,
        module="train.settings.reference",
        interrupted="reference: stopped. The page is as it was; run it again.",
    )
