"""Every number of every command has limits, every path its home, every file its kind."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pwd
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from pipeline.console import run_command
from pipeline.convert.__main__ import main as convert
from pipeline.convert.settings import OPTION_NAMES, ConvertSettings
from pipeline.options import check_arguments
from tests.unit.test_doors import DOORS

WITHOUT_DATACLASS = {"train.pretrain"}
"""Its options are the settings: tests/unit/test_settings_limits.py."""
OPTIONS_OF_SETTINGS = {
    OPTION_NAMES.get(name, name) for name in ConvertSettings.model_fields
}
"""Options of pipeline.convert that its settings check."""
NO_PATHS = {
    ("pipeline.bench", "device"),
    ("pipeline.convert", "ray_address"),
    ("pipeline.convert", "shards"),
    ("pipeline.verify", "image_component"),
    ("train.checkpoint_bench", "model"),
    ("train.step_bench", "model"),
}
"""Texts that are not paths."""


def arguments_of(door: str) -> type[Any]:
    for name in (f"{door}.__main__", door):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        # The options of a conversion are made from its settings.
        return (
            module._command_line() if door == "pipeline.convert" else module.Arguments
        )
    raise AssertionError(door)


def leaves(
    hint: Any, metadata: tuple[Any, ...] = ()
) -> list[tuple[Any, tuple[Any, ...]]]:
    """Give the plain types within a hint, each with what is annotated on it."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        inner, *more = typing.get_args(hint)
        return leaves(inner, (*metadata, *more))
    if origin is typing.Literal:
        return []
    if origin in (tuple, list, typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not Ellipsis]
        return [leaf for option in options for leaf in leaves(option, metadata)]
    return [(hint, metadata)]


def limits(metadata: tuple[Any, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in metadata:
        for part in getattr(item, "metadata", [item]):
            for key in ("ge", "gt", "le", "lt"):
                if getattr(part, key, None) is not None:
                    found[key] = getattr(part, key)
    return found


def options_of(door: str) -> list[tuple[str, Any, tuple[Any, ...]]]:
    hints = typing.get_type_hints(arguments_of(door), include_extras=True)
    if door == "pipeline.convert":
        hints = {
            name: hint
            for name, hint in hints.items()
            if name not in OPTIONS_OF_SETTINGS
        }
    return [(name, *leaf) for name, hint in hints.items() for leaf in leaves(hint)]


CHECKED = [door for door in DOORS if door not in WITHOUT_DATACLASS]


@pytest.mark.parametrize("door", CHECKED)
def test_every_number_has_a_lowest_and_a_highest_value(door: str) -> None:
    for name, kind, metadata in options_of(door):
        if kind in (int, float):
            found = limits(metadata)
            assert {"ge", "gt"} & found.keys(), f"{door} --{name} has no lowest value"
            assert {"le", "lt"} & found.keys(), f"{door} --{name} has no highest value"


@pytest.mark.parametrize("door", CHECKED)
def test_every_path_is_checked_as_one(door: str) -> None:
    for name, kind, metadata in options_of(door):
        if kind in (str, Path) and (door, name) not in NO_PATHS:
            checks = [
                item for item in metadata if type(item).__name__ == "AfterValidator"
            ]
            assert checks, (
                f"{door} --{name} is a text without a check: use a type of options.py"
            )


NUMBERS = [
    (door, name, kind, metadata)
    for door in CHECKED
    for name, kind, metadata in options_of(door)
    if kind in (int, float)
]


def is_within(value: float, found: dict[str, float]) -> bool:
    return all(
        (
            value >= found.get("ge", value),
            value > found.get("gt", value - 1),
            value <= found.get("le", value),
            value < found.get("lt", value + 1),
        )
    )


@pytest.mark.parametrize(("door", "name", "kind", "metadata"), NUMBERS)
def test_odd_numbers_are_refused_by_name_or_within_the_limits(
    door: str,
    name: str,
    kind: type,
    metadata: tuple[Any, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = arguments_of(door)
    reached: list[Any] = []

    def body(given: Any) -> int:
        reached.append(getattr(given, name))
        return 0

    words = ["x" for field in needed(arguments)] + more_words(door)
    for text in ("-1", "0", "1", "10" * 20, "nan", "inf", "-inf", "1e400"):
        reached.clear()
        option = f"--{name.replace('_', '-')}"
        try:
            code = run_command(
                body, arguments, [*words, option, text], module=door, interrupted=""
            )
        except SystemExit as left:
            # tyro's own: not a number of this kind at all.
            code = int(left.code or 0)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        if code:
            assert code == 2
            assert not reached
            assert option in said, said
            continue
        value = reached[0][0] if isinstance(reached[0], tuple) else reached[0]
        assert is_within(value, limits(metadata)), f"{option} {text} got through"


def needed(arguments: type[Any]) -> list[str]:
    """Give the positional fields without a default."""
    return [
        field.name
        for field in dataclasses.fields(arguments)
        if field.default is dataclasses.MISSING and field.name != "to"
    ]


def more_words(door: str) -> list[str]:
    return ["--to", "mae"] if door == "train.export" else []


@pytest.mark.parametrize(
    ("door", "changes", "says"),
    [
        (
            "train.evaluate",
            {"max_images": -3},
            "--max-images -3: expected a value greater",
        ),
        ("train.reconstruct", {"count": 0}, "--count 0: expected a value greater"),
        ("train.reconstruct", {"count": -1}, "--count -1"),
        ("train.reconstruct", {"seed": -1}, "--seed -1"),
        (
            "train.reconstruct",
            {"out": "x.jpg"},
            "will hold PNG: give a name that ends in .png",
        ),
        ("train.reconstruct", {"out": "x"}, "for example x.png"),
        (
            "train.reconstruct",
            {"out": "s3://bucket/x.png"},
            "a local path was expected",
        ),
        ("train.evaluate", {"out": "x.png"}, "will hold JSON"),
        ("train.export", {"to": "mae", "patch_size": 0}, "--patch-size 0"),
        (
            "train.export",
            {"to": "mae", "out": "s3://bucket/x"},
            "a local path was expected",
        ),
        ("pipeline.inspect", {"count": 0}, "--count 0"),
        ("pipeline.inspect", {"out": "x.jpeg"}, "give a name that ends in .png"),
        ("pipeline.bench", {"seconds": float("nan")}, "--seconds nan"),
        ("pipeline.bench", {"seconds": 0.0}, "--seconds 0.0"),
        ("pipeline.bench", {"hw_decoder_load": 1.5}, "--hw-decoder-load 1.5"),
        ("pipeline.bench", {"tuning_file": Path("x.json")}, "will hold TOML"),
        ("pipeline.bench", {"report": Path("x.html")}, "will hold MD"),
        ("pipeline.shuffle_quality", {"lanes": (1, 0)}, "--lanes 0"),
        ("train.demo", {"minutes": float("inf")}, "--minutes inf"),
        ("train.demo", {"run_dir": "s3://bucket/run"}, "a local path was expected"),
        ("train.step_bench", {"images": (0,)}, "--images 0"),
        ("pipeline.verify", {"uri": "a\0b"}, "control characters"),
    ],
)
def test_the_message_names_option_value_and_remedy(
    door: str, changes: dict[str, Any], says: str
) -> None:
    from pipeline.errors import ConfigError

    arguments = arguments_of("train.demo.stages" if door == "train.demo" else door)
    given = dict.fromkeys(needed(arguments), "x") | changes
    with pytest.raises(ConfigError) as caught:
        check_arguments(arguments(**given))
    assert says in str(caught.value)


def test_all_options_that_cannot_work_are_told_at_once() -> None:
    from pipeline.errors import ConfigError
    from train.reconstruct import Arguments

    with pytest.raises(ConfigError) as caught:
        check_arguments(Arguments("x", out="x.jpg", count=0, seed=-1))
    for option in ("--out", "--count", "--seed"):
        assert option in str(caught.value)


def test_the_home_folder_is_expanded_in_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.bench.__main__ import Arguments as Bench
    from pipeline.errors import ConfigError
    from train.reconstruct import Arguments

    monkeypatch.setenv("HOME", str(tmp_path))
    me = pwd.getpwuid(os.getuid())
    given = check_arguments(Arguments("~/run", images="~/my pictures", out="~/x.png"))
    assert given.checkpoint == f"{tmp_path}/run"
    assert given.images == f"{tmp_path}/my pictures"
    assert given.out == f"{tmp_path}/x.png"
    assert (
        check_arguments(Arguments("s3://bucket/~run")).checkpoint == "s3://bucket/~run"
    )
    assert check_arguments(Arguments(f"~{me.pw_name}/r")).checkpoint == f"{me.pw_dir}/r"
    bench = check_arguments(Bench(folder=Path("~/f"), tuning_file=Path("~/t.toml")))
    assert (bench.folder, bench.tuning_file) == (tmp_path / "f", tmp_path / "t.toml")
    with pytest.raises(ConfigError, match="no user called 'nosuchuser'"):
        check_arguments(Arguments("~nosuchuser/run"))


def test_relative_paths_and_patterns_stay_as_they_are() -> None:
    from pipeline.verify import Arguments

    for uri in ("a/../b", "./~x", "data/train-*.parquet", "", "s3://b/x?y", "a//b/"):
        assert check_arguments(Arguments(uri)).uri == uri


@pytest.mark.parametrize(
    "option",
    [
        "--samples-per-shard",
        "--resize",
        "--max-resolution",
        "--quality",
        "--limit",
        "--shard-size",
        "--smart-threshold",
        "--shuffle-seed",
        "--workers",
    ],
)
@pytest.mark.parametrize("text", ["-1", "1" + 40 * "0", "nan", "1e400"])
def test_a_conversion_refuses_odd_numbers(
    option: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = convert([str(tmp_path), str(tmp_path / "out"), option, text])
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr().err
    assert code == 2, said
    assert option in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
