"""Numbers that go wrong in a real run on several ranks: skipped, gone back from, told, or stopped
at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.train_runs import start
from train.checkpoint.files import find_steps
from train.checkpoint.state import load_weights
from train.process.outcome import read_status
from train.report.metrics_file import read_metrics

pytestmark = pytest.mark.slow

NAN = float("nan")
SETTINGS = {
    "train.steps": "20",
    "checkpoint.every-steps": "4",
    "engine.zero-stage": "2",
    # Where weights are equal on all ranks nothing is said of them, also around skipped steps and
    # going back.
    "guard.checksum-every-steps": "1",
}


def test_a_line_over_skipped_steps_only_has_no_loss(
    make_dataset: Callable[..., str], tmp_path: Path
):
    """Steps 2 and 3 meet a NaN; each has a line of its own, without a mean over no steps."""
    plan = {"scale": [{"rank": None, "first": 3, "last": 4, "factor": NAN}]}
    settings = {"train.steps": "6", "engine.kind": "torch"}
    done = start(tmp_path, plan, data=make_dataset(), ranks=1, settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["loss"] is None] == [2, 3]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 2, 2]
    assert done.stdout.count("no step taken") == 2
    assert "nan" not in done.stdout


def test_steps_that_are_not_finite_on_one_rank_are_skipped_gone_back_from_and_passed_over(
    make_dataset: Callable[..., str], tmp_path: Path
):
    """Steps 10 to 14 meet a NaN on rank 1: the weights go back to step 8, the data goes on behind
    step 14."""
    plan = {"scale": [{"rank": 1, "first": 9, "last": 13, "factor": NAN}]}
    done = start(tmp_path, plan, data=make_dataset(), settings=SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "run"
    status = read_status(run_dir)
    assert (status["state"], status["step"]) == ("done", 20)
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 21)), (
        "a step is missing or there twice"
    )
    assert all(line["loss"] is not None for line in lines)
    assert lines[-1]["skipped_steps"] == 5
    assert [line["roll_backs"] for line in lines] == [0] * 8 + [1] * 12
    assert "back to the weights of step 8 (1 of 3 times)" in done.stdout
    assert done.stdout.count("the loss on rank 1 is not finite") == 5
    names = sorted(path.name for path in run_dir.glob("nonfinite-*.json"))
    # 60 images in batches of 12: step 10 is the last batch of its epoch, the next ones are of
    # another.
    places = [f"{step:06d}-at-{(step - 1) // 5}-" for step in range(10, 15)]
    assert [
        name.removeprefix("nonfinite-step-")[: len(places[0])] for name in names
    ] == places
    assert all(name.endswith("-rank-1.json") for name in names)
    record = json.loads((run_dir / names[0]).read_text())
    assert (record["step"], record["rank"], record["losses"]) == (10, 1, [None])
    assert len(record["sample_ids"]) == len(record["epochs"]) == 6
    # No checkpoint of weights under suspicion (step 12 comes by twice); the last one is six batches
    # further on.
    assert done.stdout.count("saved step 12 ") == 1
    assert list(find_steps(str(run_dir / "checkpoints"))) == [4, 8, 12, 16, 20]
    loader = load_weights(str(run_dir))[1]["client"]["loader"]
    assert (loader["epoch"], loader["position"]) in (
        ((20 + 6) // 5, (20 + 6) % 5 * 12),
        (5, 12),
    )


def test_a_run_that_keeps_going_wrong_stops_with_code_5(
    make_dataset: Callable[..., str], tmp_path: Path
):
    """With two skipped steps a time: back to 8, again to the one before it, then no more."""
    plan = {"scale": [{"rank": 0, "first": 9, "last": 999, "factor": NAN}]}
    settings = {
        **SETTINGS,
        "guard.skipped-in-a-row": "2",
        "guard.roll-backs": "2",
        "engine.zero-stage": "3",
    }
    done = start(tmp_path, plan, data=make_dataset(), settings=settings)
    assert done.returncode != 0
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 5), done.stderr
    assert (
        "weights are not compared between ranks: at engine.zero_stage 3" in done.stdout
    )
    assert "went back 2 times already" in status["reason"]
    assert "back to the weights of step 8 (1 of 2 times)" in done.stdout
    assert "back to the weights of step 4 (2 of 2 times)" in done.stdout
    assert done.stderr.count("error: ") == 1, done.stderr


def test_a_loss_that_jumps_is_told_and_saved(
    make_dataset: Callable[..., str], tmp_path: Path
):
    plan = {"scale": [{"rank": None, "first": 10, "last": 11, "factor": 30.0}]}
    settings = {**SETTINGS, "train.steps": "14", "checkpoint.every-steps": "100"}
    done = start(tmp_path, plan, data=make_dataset(), ranks=1, settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    # One rank takes two micro-batches a step.
    assert done.stdout.count("saving an extra checkpoint") == 1
    assert "warning: step 6: the loss is" in done.stdout
    assert list(find_steps(str(tmp_path / "run" / "checkpoints"))) == [6, 14]


def test_a_replica_with_one_wrong_bit_is_named(
    make_dataset: Callable[..., str], tmp_path: Path
):
    settings = {
        **SETTINGS,
        "engine.zero-stage": "0",
        "train.micro-batch-size": "4",
        "guard.checksum-every-steps": "3",
    }
    plan = {"flip": {"rank": 1, "after": 3}}
    done = start(tmp_path, plan, data=make_dataset(), ranks=3, settings=settings)
    assert done.returncode != 0
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 5, 6), (
        done.stderr
    )
    assert "step 3" not in status["reason"], "the weights were equal still"
    assert (
        "step 6: the weights are not equal on all ranks: rank 1 (" in status["reason"]
    )
    assert "blocks.0.mlp.fc1.weight" in status["reason"]
