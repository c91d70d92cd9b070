"""docs/configuration.md is what the settings' models say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from pipeline.config import Settings
from pipeline.errors import ConfigError
from train.config import RunConfig
from train.settings import reference
from train.settings.layers import setting_types

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_page_is_fresh() -> None:
    page = (REPOSITORY / "docs/configuration.md").read_text()
    assert page == reference.render(), f"run {reference.COMMAND}"


def test_the_page_has_a_row_for_every_setting() -> None:
    page = reference.render()
    for name in setting_types():
        assert page.count(f"\n| `{name}` | ") >= 1, name


def test_the_settings_of_a_conversion_have_the_names_of_the_command_line() -> None:
    page = reference.render()
    assert "| `--shard-size` | size >= 1 | `256MB` | bytes |" in page
    assert "shard-size-bytes" not in page


def test_a_stale_page_is_refused_and_then_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(reference, "PAGE", page)
    assert reference.main(["--check"]) == ConfigError.exit_code
    assert reference.COMMAND in capsys.readouterr().err
    assert not page.exists()
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    page.write_text(page.read_text().replace("`bf16`", "`fp8`"))
    assert reference.main(["--check"]) == ConfigError.exit_code


class Documented(Settings):
    """A group."""

    size_gib: float = Field(default=1.5, gt=0)
    """How much.

    With a | in it.
    """
    count: int | None = Field(default=None, ge=0, le=2**63 - 1)
    """How many."""


class Inherits(Documented):
    """A group with one more field."""

    name: str = ""
    """A name."""


class Bare(Settings):
    """A group with a field that nobody explains."""

    secret: int = 1


def test_help_is_read_from_the_source_of_a_class_and_its_bases() -> None:
    assert reference.field_help(Inherits) == {
        "size_gib": "How much. With a \\| in it.",
        "count": "How many.",
        "name": "A name.",
    }


def test_a_field_without_help_is_refused() -> None:
    with pytest.raises(ConfigError, match="Bare: no help under secret"):
        reference.field_help(Bare)


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        (Documented, "size_gib", "number > 0"),
        (Documented, "count", "whole number or none >= 0, <= 2^63 - 1"),
        (Inherits, "name", "text"),
        (RunConfig, "engine", ""),
    ],
)
def test_types_and_limits_are_described(
    model: type[BaseModel], name: str, said: str
) -> None:
    assert reference.describe_type(model, name) == said


def test_units_follow_the_names() -> None:
    assert reference.unit_of("cache_size_gib") == "GiB"
    assert reference.unit_of("every_steps") == "steps"
    assert reference.unit_of("beta1") == ""


def test_the_page_is_written_without_torch() -> None:
    code = "import sys, train.settings.reference; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert done.returncode == 0
