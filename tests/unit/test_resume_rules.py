"""Every setting has a class, and a resume compares, refuses and accepts by it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import ConfigError
from train.config import RunConfig
from train.settings.command_line import parse_run
from train.settings.layers import setting_types
from train.settings.resume_rules import (
    NEVER_ACCEPTED,
    ORDER_SETTINGS,
    RULES,
    Change,
    accept_problems,
    describe_refused,
    find_changes,
    of_rule,
    split_names,
)


def saved(**sections: dict[str, Any]) -> dict[str, Any]:
    return RunConfig.model_validate(sections).model_dump(mode="json")


def test_every_setting_has_a_class_and_every_class_a_setting() -> None:
    assert set(RULES) == set(setting_types())


def test_what_decides_numbers_defines_the_run() -> None:
    defining = {name for name, rule in RULES.items() if rule == "defines"}
    for section in ("model", "view", "order"):
        assert {name for name in RULES if name.startswith(f"{section}.")} <= defining
    named = {"train.seed", "optim.base_lr", "optim.weight_decay", "optim.schedule"}
    assert named <= defining
    assert defining >= ORDER_SETTINGS | NEVER_ACCEPTED


@pytest.mark.parametrize(
    ("sections", "name", "rule"),
    [
        ({"model": {"mask_ratio": 0.5}}, "model.mask_ratio", "defines"),
        ({"view": {"flip_probability": 0.0}}, "view.flip_probability", "defines"),
        ({"order": {"lanes": 8}}, "order.lanes", "defines"),
        ({"optim": {"weight_decay": 0.1}}, "optim.weight_decay", "defines"),
        ({"train": {"epochs": 900}}, "train.epochs", "may change"),
        ({"engine": {"zero_stage": 3}}, "engine.zero_stage", "may change"),
        ({"log": {"every_steps": 3}}, "log.every_steps", "free"),
    ],
)
def test_a_changed_setting_is_found_in_its_class(
    sections: dict[str, Any], name: str, rule: Any
) -> None:
    changes = find_changes(saved(), saved(**{"train": {"epochs": 800}, **sections}))
    assert [change.name for change in changes] == [name]
    assert of_rule(changes, rule) == changes


@pytest.mark.parametrize("size", [32, [32, 32], "32x32"])
def test_spellings_of_one_size_are_no_change(size: Any) -> None:
    view = {"height": 32, "width": 32}
    before = saved(model={"image_size": 32}, view=view)
    assert find_changes(before, saved(model={"image_size": size}, view=view)) == []
    before["model"]["image_size"] = [32, 32]
    assert find_changes(before, saved(model={"image_size": 32}, view=view)) == []


def test_settings_that_an_older_version_did_not_have_are_no_change() -> None:
    before = saved()
    del before["resume"], before["optim"]["schedule"]
    before["optim"]["gone_since"] = 1
    assert find_changes(before, saved()) == []


def test_a_refusal_names_both_values_and_the_way_on() -> None:
    text = describe_refused(
        [Change("model.mask_ratio", 0.75, 0.5), Change("optim.warmup_steps", None, 4)],
        where="s3://b/step-000004",
    )
    assert "model.mask_ratio is 0.5, the run was started with 0.75" in text
    assert "optim.warmup_steps is 4, the run was started with none" in text
    assert "--resume.accept model.mask-ratio,optim.warmup-steps" in text
    assert split_names("model.mask-ratio, --optim.warmup_steps,") == [
        "model.mask_ratio",
        "optim.warmup_steps",
    ]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("optim.base_lrr", "did you mean optim.base_lr"),
        ("model.depth", "cannot be accepted"),
        ("model.image-size", "cannot be accepted"),
        ("view.min-area,order.lane", "order.lanes"),
    ],
)
def test_names_that_cannot_be_accepted_are_told_before_the_start(
    names: str, says: str
) -> None:
    assert any(says in problem for problem in accept_problems(names))
    with pytest.raises(ConfigError, match=says):
        parse_run(["demo", "--data.train", "x", "--resume.accept", names])


def test_names_to_accept_may_be_a_list_in_a_file(tmp_path: Any) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[resume]\naccept = ["optim.base_lr", "train.seed"]\n')
    config = parse_run(["demo", "--data.train", "x", "--config", str(path)])
    assert split_names(config.resume.accept) == ["optim.base_lr", "train.seed"]
