"""How long the demo trains and measures: chosen by the machine's speed, kept by the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from train.config import RunConfig
from train.demo.machine import Found, Speed, count_ranks
from train.demo.pictures import Pictures
from train.demo.plan import (
    ALL_IMAGES,
    EVALUATION_S,
    FEWEST_IMAGES,
    FEWEST_STEPS,
    PLAN_FILE,
    Asked,
    Plan,
    choose_images,
    choose_plan,
    choose_steps,
    explain,
    images_to_read,
    keep_plan,
    kept_plan,
)
from train.demo.stages import Arguments, check_arguments
from train.settings.text import to_toml

FOUND = Found(gpus=0, bf16_over_fp32=3.0, start_s=4.0)


def pictures(
    num_train: int = 2285, num_val: int = 191, num_classes: int = 15
) -> Pictures:
    return Pictures(Path("train"), Path("val"), num_train, num_val, num_classes)


def test_a_fast_machine_takes_the_steps_of_the_recipe_and_a_slower_one_what_fits():
    assert choose_steps(0, step_s=0.01) == 800
    assert choose_steps(0, step_s=0.174) == 800
    assert choose_steps(0, step_s=0.533) == 450
    assert choose_steps(0, step_s=60.0) == FEWEST_STEPS


def test_minutes_are_followed_without_floor_or_ceiling():
    assert choose_steps(10, step_s=0.1) == 6000
    assert choose_steps(0.05, step_s=1.0) == 3
    assert choose_steps(0.001, step_s=1.0) == 2


@given(step_s=st.floats(1e-3, 1e3), slower=st.floats(1.0, 10.0))
def test_a_slower_machine_never_takes_more_steps(step_s: float, slower: float):
    assert choose_steps(0, step_s=step_s * slower) >= FEWEST_STEPS
    assert (
        choose_steps(0, step_s=step_s * slower) <= choose_steps(0, step_s=step_s) <= 800
    )


@given(
    num_train=st.integers(1, 50_000),
    num_val=st.integers(1, 5_000),
    num_classes=st.sampled_from([0, 15]),
    features_per_s=st.floats(1.0, 1e5),
)
def test_what_is_measured_fits_its_time_and_is_never_too_little(
    num_train: int, num_val: int, num_classes: int, features_per_s: float
):
    there = pictures(num_train, num_val, num_classes)
    chosen = choose_images(there, features_per_s=features_per_s)
    assert FEWEST_IMAGES <= chosen <= ALL_IMAGES
    if chosen > FEWEST_IMAGES:
        assert images_to_read(there, chosen) <= EVALUATION_S * features_per_s
    if chosen < ALL_IMAGES:
        assert images_to_read(there, chosen + 1) > EVALUATION_S * features_per_s, (
            "one more fits"
        )


def test_the_time_is_said_before_it_is_spent():
    plan = choose_plan(
        Asked(), FOUND, Speed(step_s=0.5, features_per_s=500.0), pictures()
    )
    text = explain(plan, FOUND, Speed(step_s=0.5, features_per_s=500.0), pictures())
    assert plan == Plan(480, "fp32", ALL_IMAGES)
    assert "bf16 products take 3.00x" in text
    assert "480 steps, about 4 min 00 s of training, about 4 min 58 s in all" in text
    assert "slow" not in text


def test_a_slow_machine_is_called_slow():
    speed = Speed(step_s=5.0, features_per_s=20.0)
    plan = choose_plan(Asked(), FOUND, speed, pictures())
    text = explain(plan, FOUND, speed, pictures())
    assert plan.steps == FEWEST_STEPS
    assert "16 min 40 s of training" in text
    assert f"this machine is slow: {FEWEST_STEPS} steps are the fewest" in text
    assert f"{plan.max_images} images of each dataset at most" in text
    few = choose_plan(Asked(steps=16), FOUND, speed, pictures())
    assert "16 steps are too few to show learning" in explain(
        few, FOUND, speed, pictures()
    )


def test_a_run_keeps_its_plan_whatever_the_machine_is_worth_later(tmp_path: Path):
    assert kept_plan(tmp_path, Asked()) is None
    plan = Plan(450, "fp32", 700)
    keep_plan(tmp_path, plan)
    assert kept_plan(tmp_path, Asked()) == plan
    assert kept_plan(tmp_path, Asked(steps=900)) is None
    assert kept_plan(tmp_path, Asked(minutes=2)) is None


def test_what_was_asked_for_is_kept_too(tmp_path: Path):
    plan = Plan(333, "autocast", ALL_IMAGES, Asked(minutes=2))
    keep_plan(tmp_path, plan)
    assert kept_plan(tmp_path, Asked(minutes=2)) == plan
    assert kept_plan(tmp_path, Asked()) == plan


def test_a_run_of_an_earlier_version_keeps_its_steps(tmp_path: Path):
    config = RunConfig.model_validate(
        {
            "train": {"steps": 777, "global_batch_size": 64, "micro_batch_size": 32},
            "optim": {"warmup_steps": 1, "warmup_epochs": None},
            "engine": {"precision": "fp32"},
        }
    )
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert kept_plan(tmp_path, Asked()) == Plan(777, "fp32", ALL_IMAGES)


@pytest.mark.parametrize("text", ["", "{", '{"steps": "many"}', "[]"])
def test_a_spoilt_plan_is_no_plan(tmp_path: Path, text: str):
    (tmp_path / PLAN_FILE).write_text(text)
    assert kept_plan(tmp_path, Asked()) is None


def test_ranks_are_a_power_of_two_up_to_eight():
    assert [count_ranks(n) for n in (1, 2, 3, 4, 7, 8, 64)] == [1, 2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (Arguments(ranks=3), "--ranks 3 does not divide"),
        (Arguments(steps=5, minutes=1), "give one of them"),
        (Arguments(steps=-5), "at least 0"),
        (Arguments(steps=1), "at least 2"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(arguments: Arguments, named: str):
    with pytest.raises(ConfigError, match=named):
        check_arguments(arguments)
