"""Settings that cannot work are refused before the start, by name, with exit code 2."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from pydantic import BaseModel

from pipeline.errors import ConfigError
from tests.random_settings import some_settings
from tests.unit.test_options import leaves, limits
from train import pretrain
from train.config import RunConfig
from train.settings.command_line import parse_run
from train.settings.engine_rules import machine_problems
from train.settings.lengths import length_problems
from train.settings.text import to_toml

ALONE = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}


def hints_by_name() -> dict[str, Any]:
    """Give the type of every setting with its limits."""
    found: dict[str, Any] = {}
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            hints = typing.get_type_hints(kind, include_extras=True)
            found |= {f"{section}.{name}": hints[name] for name in kind.model_fields}
    return found


HINTS = hints_by_name()
NUMBERS = [
    (name, kind, metadata)
    for name, hint in HINTS.items()
    for kind, metadata in leaves(hint)
    if kind in (int, float)
]


def problems_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run(["demo", "--data.train", "shards", *words], env=ALONE)
    return str(caught.value)


@pytest.mark.parametrize(("name", "kind", "metadata"), NUMBERS)
def test_every_number_has_a_lowest_and_a_highest_value(
    name: str, kind: type, metadata: tuple[Any, ...]
) -> None:
    found = limits(metadata)
    if name == "model.image_size":  # checked with the patch size
        return
    assert {"ge", "gt"} & found.keys(), f"{name} has no lowest value"
    assert {"le", "lt"} & found.keys(), f"{name} has no highest value"


@pytest.mark.parametrize("name", sorted({name for name, _, _ in NUMBERS}))
def test_what_is_not_a_number_is_refused_in_every_number(
    name: str, tmp_path: Path
) -> None:
    for text in ("nan", "inf", "-inf", "1e400", "-1", "9" * 40, "x", ""):
        said = problems_of(f"--{name}={text}") if text else problems_of(f"--{name}")
        # Fields that must fit each other name their section once, in front.
        assert name.replace("_", "-") in said or name.partition(".")[2] in said, text
    # A file has words for them too.
    for text in ("nan", "inf", "-inf"):
        file = tmp_path / "run.toml"
        file.write_text(f"{name} = {text}\n")
        assert name in problems_of("--config", str(file))


# ------------------------------------------------------------------------------ warm-up, schedule


def config_of(*words: str) -> RunConfig:
    return parse_run(["mae_vit_b_16", "--data.train", "shards", *words], env=ALONE)


@pytest.mark.parametrize(
    ("words", "num_images", "is_refused"),
    [
        (("--train.steps", "100"), 1_281_167, True),  # 40 epochs are 12,500 steps
        (("--train.steps", "20000"), 1_281_167, False),
        (("--train.steps", "100"), 4096, False),  # 40 epochs are 40 steps
        (("--train.steps", "40"), 4096, True),
        (("--optim.warmup-steps", "400"), 4096, False),  # 800 epochs are 800 steps
        (("--optim.warmup-steps", "800"), 4096, True),
        (
            ("--optim.warmup-steps", "500", "--order.remainder", "drop"),
            4096 * 2 - 1,
            False,
        ),
        (("--optim.warmup-steps", "0", "--train.steps", "1"), 4096, False),
        (("--train.epochs", "0.001", "--optim.warmup-epochs", "0"), 4096, False),
        (("--train.epochs", "0.001", "--optim.warmup-steps", "1"), 4096, True),
        (("--train.steps", "10", "--optim.warmup-epochs", "0.5"), 4096, False),
    ],
)
def test_a_warm_up_is_shorter_than_the_run_in_any_units(
    words: tuple[str, ...], num_images: int, is_refused: bool
) -> None:
    problems = length_problems(config_of(*words), num_samples=num_images)
    assert bool(problems) == is_refused, problems
    if is_refused:
        [problem] = problems
        assert "optim.warmup" in problem
        assert "train." in problem
        assert "--optim.warmup-steps" in problem


@pytest.mark.parametrize(
    ("num_images", "is_refused"), [(1, True), (4095, True), (4096, False)]
)
def test_an_epoch_has_a_whole_batch_if_the_rest_is_dropped(
    num_images: int, is_refused: bool
) -> None:
    words = (
        "--order.remainder",
        "drop",
        "--train.steps",
        "50",
        "--optim.warmup-steps",
        "5",
    )
    problems = length_problems(config_of(*words), num_samples=num_images)
    assert bool(problems) == is_refused
    if is_refused:
        assert "order.remainder drop" in problems[0]
        assert f"{num_images:,} samples" in problems[0]


SMALL = ("--train.global-batch-size", "4", "--train.micro-batch-size", "4")


@pytest.mark.parametrize("is_dry", [False, True])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--train.steps", "9", "--optim.warmup-epochs", "9"), "never reach its peak"),
        (
            ("--order.remainder", "drop", "--train.global-batch-size", "4096"),
            "has no step",
        ),
    ],
)
def test_the_size_of_the_data_is_asked_before_torch_is_imported(
    words: tuple[str, ...],
    says: str,
    is_dry: bool,
    make_dataset: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(pretrain, "end_now", ended)
    monkeypatch.setattr(
        "train.loop.loop.train",
        lambda *_: pytest.fail("the run was started"),
        raising=True,
    )
    started = [
        "demo",
        "--data.train",
        make_dataset(),
        "--run.dir",
        str(tmp_path / "run"),
        *SMALL,
    ]
    try:
        code = pretrain.main([*started, *words, *(["--dry-run"] if is_dry else [])])
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said
    assert (tmp_path / "run" / "status.json").exists() != is_dry


def test_the_lowest_rate_is_not_above_the_peak() -> None:
    # The demo's batch is 64: its peak is a quarter of base_lr.
    assert "optim.min_lr 0.003 is above the peak rate 0.0025" in problems_of(
        "--optim.base-lr", "0.01", "--optim.min-lr", "0.003"
    )
    words = [
        "demo",
        "--data.train",
        "x",
        "--optim.base-lr",
        "0.01",
        "--optim.min-lr",
        "0.0025",
    ]
    assert math.isclose(parse_run(words, env=ALONE).optim.min_lr, 0.0025)


# ------------------------------------------------------------------------------ decoder and machine


@pytest.mark.parametrize(
    ("decoder", "interpolation", "is_refused"),
    [
        ("dali", "area", True),
        ("dali", "bilinear", False),
        ("ffcv", "bicubic", True),
        ("ffcv", "area", False),
        ("auto", "area", False),
        ("turbo", "area", False),
    ],
)
def test_a_decoder_has_the_filter_of_the_view(
    decoder: str, interpolation: str, is_refused: bool
) -> None:
    words = ("--loader.decoder", decoder, "--view.interpolation", interpolation)
    # For a dry run too: no machine has such a decoder.
    dry = ["demo", *words, "--dry-run"]
    if is_refused:
        with pytest.raises(ConfigError, match=f"view.interpolation {interpolation}"):
            parse_run(dry, env=ALONE)
    else:
        assert parse_run(dry, env=ALONE).loader.decoder == decoder


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (("--loader.decoder", "dali"), "nvidia.dali"),
        (("--loader.decoder", "ffcv", "--view.interpolation", "area"), "ffcv"),
        (("--log.wandb", "on"), "wandb"),
        (("--log.mlflow", "on"), "mlflow"),
    ],
)
def test_a_package_that_is_missing_is_an_error_of_a_run_and_a_note_of_a_dry_run(
    words: tuple[str, ...], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "train.settings.engine_rules._is_installed", lambda name: name != package
    )
    assert f"needs the package {package}" in problems_of(*words)
    config = parse_run(["demo", *words, "--dry-run"], env=ALONE)
    assert package in "".join(machine_problems(config))


@pytest.mark.parametrize("content", [None, "[loader", b"\xff"])
def test_a_tuning_file_that_cannot_be_read_is_told_before_the_start(
    content: str | bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "tuned.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"loader.tuning_file {path}: cannot be used" in problems_of(
        "--loader.tuning-file", str(path)
    )


# --------------------------------------------------------------------------------------- at random


def names_one(said: str, drawn: dict[str, str]) -> bool:
    return any(name.partition(".")[2] in said for name in drawn)


def test_settings_at_random_are_refused_by_name_or_read_back(tmp_path: Path) -> None:
    """tests/integration/test_settings_at_random.py starts them."""
    file = tmp_path / "run.toml"

    @settings(max_examples=150)
    @given(drawn=some_settings())
    def refused_or_read_back(drawn: dict[str, str]) -> None:
        words = [f"--{name}={word}" for name, word in drawn.items()]
        refusal = ""
        try:
            config = parse_run(["demo", "--data.train=shards", *words], env=ALONE)
        except ConfigError as error:
            refusal = str(error)
        if refusal:
            assert names_one(refusal, drawn), refusal
            return
        file.write_text(to_toml(config), encoding="utf-8")
        assert parse_run(["demo", f"--config={file}"], env=ALONE) == config

    refused_or_read_back()
