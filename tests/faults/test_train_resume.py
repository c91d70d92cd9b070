"""Real runs that are resumed: by another job, with other settings, another batch size, or longer.

A dataset of 60 images, 12 per step: an epoch is five steps.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from tests import launch
from tests.faults.train_runs import losses, start, words_of
from tests.limits import wait_until
from train.checkpoint.files import committed_steps, step_name
from train.process.outcome import read_status
from train.report.earlier_run import read_history
from train.report.metrics_file import read_metrics

pytestmark = pytest.mark.slow

STEADY = {
    "train.steps": "10",
    "optim.warmup-steps": "1",
    "checkpoint.every-steps": "2",
    "engine.kind": "torch",
}


@pytest.fixture
def data(make_dataset: Callable[..., str]) -> str:
    return make_dataset()


def run(folder: Path, data: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; `kill__step` kills it there."""
    named = {
        name.replace("__", ".").replace("_", "-"): value
        for name, value in changes.items()
    }
    kill = named.pop("kill.step", None)
    plan = {} if kill is None else {"kill": {"rank": 0, "step": int(kill)}}
    return start(folder, plan, data=data, ranks=1, settings={**STEADY, **named})


def client_of(checkpoints: str, step: int) -> dict[str, Any]:
    uri = storage.join(checkpoints, step_name(step), "state.json")
    client: dict[str, Any] = json.loads(storage.read_bytes(uri))["client"]
    return client


# ------------------------------------------------------------------------------ one run, one folder


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.remote)])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "shared")
    else:
        yield f"{request.getfixturevalue('s3_bucket')}/shared"


def test_two_jobs_at_one_folder_of_checkpoints(
    data: str, checkpoints: str, tmp_path: Path
):
    """The second is refused while the first lives, goes on at once when the first was killed, and
    must be the same run when the first has finished."""
    settings = {**STEADY, "train.steps": "2000", "checkpoint.dir": checkpoints}
    first_dir = tmp_path / "first" / "run"
    words = words_of(tmp_path / "first", {}, data=data, settings=settings)
    shared = {"checkpoint__dir": checkpoints}
    with launch.start(words) as first:
        wait_until(
            lambda: (
                storage.exists(checkpoints) and len(committed_steps(checkpoints)) >= 2
            ),
            what="two checkpoints",
            still_possible=first.is_running,
        )
        before = set(committed_steps(checkpoints))
        second = run(
            tmp_path / "second",
            data,
            **shared,
            train__steps="4",
            model__mask_ratio="0.5",
        )
        assert second.returncode == 2, second.stdout + second.stderr
        assert f"process {first.pids[0]} on " in second.stderr
        assert f"run.dir {first_dir}" in second.stderr
        assert "Traceback" not in second.stderr
        assert read_status(tmp_path / "second" / "run")["state"] == "failed"
        assert not read_metrics(tmp_path / "second" / "run")
        # The first goes on saving, and every step that was there still is.
        wait_until(
            lambda: max(committed_steps(checkpoints)) > max(before),
            what="a later checkpoint",
            still_possible=first.is_running,
        )
        assert before <= set(committed_steps(checkpoints))
        first.send_signal(signal.SIGKILL)
        first.wait()

    reached = max(committed_steps(checkpoints))
    more = str(reached + 4)
    third = run(tmp_path / "third", data, **shared, train__steps=more)
    assert third.returncode == 0, third.stdout + third.stderr
    assert f"resumed from step {reached} " in third.stdout
    assert before <= set(committed_steps(checkpoints))

    other = run(
        tmp_path / "fourth", data, **shared, train__steps=more, model__mask_ratio="0.5"
    )
    assert other.returncode == 2, other.stdout
    assert "model.mask_ratio is 0.5, the run was started with 0.75" in other.stderr
    same = run(tmp_path / "fifth", data, **shared, train__steps=more)
    assert f"finished: step {more} of {more}" in same.stdout, same.stderr
    assert committed_steps(checkpoints)[-1] == reached + 4


# ----------------------------------------------------------------------------------- other settings


def test_settings_that_define_the_run_are_refused_or_accepted_by_name(
    data: str, tmp_path: Path
):
    assert run(tmp_path, data, train__steps="4").returncode == 0
    run_dir = tmp_path / "run"
    settings = (run_dir / "config.toml").read_text()
    changed = {
        "view__min_area": "0.5",
        "optim__weight_decay": "0.2",
        "order__lanes": "2",
    }
    refused = run(tmp_path, data, train__steps="8", **changed)
    assert refused.returncode == 2
    for text in (
        "view.min_area is 0.5, the run was started with 0.3",
        "optim.weight_decay is 0.2, the run was started with 0.05",
        "order.lanes is 2, the run was started with 4",
        "--resume.accept view.min-area,order.lanes,optim.weight-decay",
    ):
        assert text in refused.stderr, refused.stderr
    assert (run_dir / "config.toml").read_text() == settings
    assert list(losses(run_dir)) == [1, 2, 3, 4]

    names = "view.min-area,order.lanes,optim.weight-decay"
    taken = run(tmp_path, data, train__steps="8", **changed, resume__accept=names)
    assert taken.returncode == 0, taken.stderr
    assert "accepted by resume.accept and written to history.jsonl" in taken.stdout
    assert "the new order begins with the next epoch" in taken.stdout
    assert "changed since the checkpoint: train.steps 4 -> 8" in taken.stdout
    assert list(losses(run_dir)) == list(range(1, 9))

    client = client_of(str(run_dir / "checkpoints"), 8)
    # Four steps of 12 were of the first epoch; its other 12 images are left out, not mixed.
    assert (client["loader"]["epoch"], client["loader"]["position"]) == (1, 48)
    assert {row["setting"] for row in client["changes"]} >= {
        "order.lanes",
        "train.steps",
    }
    history = read_history(run_dir)
    assert [start["from_step"] for start in history] == [0, 4]
    assert history[0]["settings"]["order"]["lanes"] == 4
    assert set(history[1]["accepted"]) == {
        "view.min_area",
        "order.lanes",
        "optim.weight_decay",
    }
    assert history[0]["run"] == history[1]["run"] == client["run"]

    # What was accepted is the run's now; the old values would be the change.
    again = run(tmp_path, data, train__steps="8", **changed)
    assert "finished: step 8 of 8" in again.stdout, again.stderr
    assert run(tmp_path, data, train__steps="8").returncode == 2


def test_a_grid_of_as_many_patches_in_another_shape_is_another_model(
    data: str, tmp_path: Path
):
    assert run(tmp_path, data, train__steps="2").returncode == 0
    for size in ("16x64", "64x16"):
        done = run(tmp_path, data, train__steps="4", model__image_size=size)
        assert done.returncode == 4, done.stderr
        assert "another model" in done.stderr
        assert f"model.image_size 32 -> {size}" in done.stderr
    heads = run(tmp_path, data, train__steps="2", model__num_heads="4")
    assert heads.returncode == 4, "a finished run is of that model too"


# ----------------------------------------------------------------------------------- another length


@pytest.mark.parametrize("batch", ["20", "6"])
def test_another_batch_size_in_mid_run(data: str, tmp_path: Path, batch: str):
    length = {
        "train.epochs": "4",
        "optim.warmup-steps": "none",
        "optim.warmup-epochs": "0.4",
        "checkpoint.every-steps": "5",
        "engine.kind": "torch",
    }
    first = start(
        tmp_path, {"kill": {"rank": 0, "step": 10}}, data=data, ranks=1, settings=length
    )
    assert first.returncode == -signal.SIGKILL
    changed = {"train.global-batch-size": batch, "train.micro-batch-size": "2"}
    done = start(tmp_path, {}, data=data, ranks=1, settings={**length, **changed})
    assert done.returncode == 0, done.stderr
    assert f"train.global_batch_size 12 -> {batch}" in done.stdout
    lines = read_metrics(tmp_path / "run")
    resumed = max(
        step for step in (5, 10) if f"resumed from step {step} " in done.stdout
    )
    images = 12 * resumed
    for line in lines[resumed:]:
        images += int(batch)
        assert line["images_seen"] == images
        assert line["epoch"] == pytest.approx(images / 60)
    assert images == 240, "four epochs of 60 images"
    assert read_status(tmp_path / "run")["step"] == lines[-1]["step"]
    rates = [line["lr"] for line in lines]
    # At the change it moves on by no more than a step of the larger batch does.
    assert abs(rates[resumed] - rates[resumed - 1]) < 0.2 * max(rates)
    assert rates[-1] < 0.1 * max(rates)
    client = client_of(str(tmp_path / "run" / "checkpoints"), lines[-1]["step"])
    assert client["images_seen"] == 240
    assert client["loader"]["epoch"] + client["loader"][
        "position"
    ] / 60 == pytest.approx(4)


def test_a_longer_run_says_what_becomes_of_its_rate(data: str, tmp_path: Path):
    assert run(tmp_path / "cosine", data, train__steps="8").returncode == 0
    longer = run(tmp_path / "cosine", data, train__steps="16")
    assert longer.returncode == 0, longer.stderr
    rates = {
        line["step"]: line["lr"] for line in read_metrics(tmp_path / "cosine" / "run")
    }
    text = f"note: the learning rate goes from {rates[8]:.3g} to {rates[9]:.3g}"
    assert text in longer.stdout
    assert "over 16 steps and was over 8" in longer.stdout
    assert "optim.schedule constant_cooldown" in longer.stdout

    constant = {"optim__schedule": "constant_cooldown", "optim__cooldown_share": "0.25"}
    flat = tmp_path / "flat"
    assert (
        run(flat, data, **constant, kill__step="9", train__steps="16").returncode != 0
    )
    longer = run(flat, data, **constant, train__steps="20")
    assert longer.returncode == 0, longer.stderr
    assert "train.steps 16 -> 20" in longer.stdout
    assert "note: the learning rate" not in longer.stdout
    rates = {line["step"]: line["lr"] for line in read_metrics(flat / "run")}
    assert len({rates[step] for step in range(5, 17)}) == 1
    assert rates[20] == pytest.approx(rates[16] / 5)


# --------------------------------------------------------------------------- nothing is overwritten


def test_a_new_run_in_an_old_folder_keeps_the_old_files(data: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    events = {"log__tensorboard": "on"}
    assert run(tmp_path, data, train__steps="4", **events).returncode == 0
    first = losses(run_dir)

    # The folder of checkpoints was emptied.
    shutil.rmtree(run_dir / "checkpoints")
    again = run(tmp_path, data, train__steps="2", train__seed="7", **events)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("has files of an earlier run, kept as") == 1
    for name in ("metrics-1.jsonl", "config-1.toml", "summary-1.json", "tensorboard-1"):
        assert (run_dir / name).exists(), name
        assert name in again.stdout
    kept = [
        json.loads(line)
        for line in (run_dir / "metrics-1.jsonl").read_text().splitlines()
    ]
    assert {line["step"]: line["loss"] for line in kept} == first
    assert list(losses(run_dir)) == [1, 2]

    # Another folder of checkpoints, which holds a longer run.
    other = tmp_path / "other"
    assert run(other, data, train__steps="6").returncode == 0
    where = str(other / "run" / "checkpoints")
    moved = run(tmp_path, data, train__steps="8", checkpoint__dir=where, **events)
    assert moved.returncode == 0, moved.stderr
    assert "metrics-2.jsonl" in moved.stdout
    assert list(losses(run_dir)) == [7, 8]
    assert [start["from_step"] for start in read_history(run_dir)] == [0, 0, 6]
