"""Settings as text: the help, and TOML that reads back to the same run."""

from __future__ import annotations

import json
from typing import Any

from train.config import RunConfig
from train.recipes import RECIPES
from train.settings.checks import build_config
from train.settings.layers import PROGRAM, default_values, flatten, merge


def to_toml(config: RunConfig) -> str:
    """Write settings as TOML that `--config` reads back to the same run; unset ones are left
    out."""
    lines = [f"# recipe: {config.recipe}"]
    for section, values in config.model_dump().items():
        # The recipe's name is the only value outside a section.
        if not isinstance(values, dict):
            continue
        lines += ["", f"[{section}]"]
        for name, value in values.items():
            # TOML has no word for None; a name that is left out is one that is not set.
            if value is not None:
                lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        items = [_toml_value(item) for item in value]
        return f"[{', '.join(items)}]"
    # TOML's basic strings, booleans and finite numbers are JSON's. Two things are not: JSON's
    # escapes of letters beyond 16 bits are pairs, which TOML refuses, and TOML wants DEL escaped.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace(
        "\x7f", "\\u007f"
    )


def help_text(recipe: str | None) -> str:
    """Render the help: usage, recipes, and every setting with its unit and its default in that
    recipe."""
    import contextlib
    import io

    import tyro
    from pydantic import create_model

    problems: list[str] = []
    layers = [("defaults", default_values())]
    if recipe is not None:
        layers.append(("recipe", flatten(RECIPES[recipe])))
    values, _ = merge(layers, problems)
    config = build_config(
        {**values, "recipe": recipe or "custom"},
        {},
        problems,
        world_size=1,
    )
    description = (
        f"Pre-train a masked autoencoder: {PROGRAM} RECIPE [--config run.toml] [--dry-run] "
        "[--section.field value "
        f"...]. Recipes: {', '.join(RECIPES)}. --config: a TOML file of the same settings; later "
        "words win over the "
        "file, and the file over the recipe. --dry-run: print the resolved settings, the steps and "
        "the model's size, "
        f"and end. The defaults shown are those of {recipe or 'no recipe'}."
    )
    # tyro shows a model's fields; the recipe is a word of its own and none of them.
    fields: dict[str, Any] = {}
    for name in RunConfig.model_fields:
        if name != "recipe":
            section = getattr(config, name)
            fields[name] = (type(section), section)
    shown = create_model("Sections", **fields)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(
            shown,
            prog=f"python -m {PROGRAM} RECIPE",
            description=description,
            args=["--help"],
            config=(tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed),
        )
    return out.getvalue()
