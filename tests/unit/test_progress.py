"""Images and epochs are counted where they are taken, whatever the batch size was before."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import RunConfig
from train.engine.optim import lr_at
from train.loop.progress import PROGRESS_KEY, Pace, Progress
from train.loop.resuming import rate_at

NUM_IMAGES = 2285


def pace(batch: int) -> Pace:
    return Pace(batch, NUM_IMAGES / batch)


def config(**changes: Any) -> RunConfig:
    optim = {"warmup_epochs": 0.5, "base_lr": 1.0}
    return RunConfig.model_validate(
        {"train": {"epochs": 4.0}, "optim": optim, **changes}
    )


@given(batch=st.integers(1, 64), step=st.integers(0, 5000))
def test_an_unbroken_run_counts_as_before_to_the_last_bit(
    batch: int, step: int
) -> None:
    run = Progress.start(pace(batch))
    settings = config(train={"epochs": 4.0, "global_batch_size": batch})
    assert run.images_at(step) == step * batch
    assert run.epochs_at(step) == step / pace(batch).steps_per_epoch
    total = max(1, round(4.0 * pace(batch).steps_per_epoch))
    assert run.total_steps(settings) == total
    assert rate_at(step, config=settings, progress=run) == lr_at(
        step, config=settings, steps_per_epoch=NUM_IMAGES / batch, total_steps=total
    )


@given(
    segments=st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 40)), min_size=1, max_size=5
    ),
)
def test_images_are_the_sum_of_all_batches(segments: list[tuple[int, int]]) -> None:
    run = Progress.start(pace(segments[0][0]))
    step = 0
    images = 0
    for batch, steps in segments:
        run = run.at_pace(pace(batch), step=step)
        step += steps
        images += batch * steps
        assert run.images_at(step) == images
        assert run.epochs_at(step) == pytest.approx(images / NUM_IMAGES)


@given(first=st.integers(4, 64), then=st.integers(4, 64), share=st.floats(0.02, 0.95))
def test_another_batch_size_leaves_the_length_in_images_and_the_rate(
    first: int, then: int, share: float
) -> None:
    whole = Progress.start(pace(first))
    before = config(train={"epochs": 4.0, "global_batch_size": first})
    after = config(train={"epochs": 4.0, "global_batch_size": then})
    step = int(share * whole.total_steps(before))
    run = whole.at_pace(pace(then), step=step)
    total = run.total_steps(after)
    assert total > step
    assert abs(run.images_at(total) - 4 * NUM_IMAGES) <= max(first, then)

    here = rate_at(step, config=before, progress=whole)
    assert rate_at(step, config=after, progress=run) == pytest.approx(
        here, rel=1e-9, abs=1e-12
    )
    rates = [rate_at(at, config=after, progress=run) for at in range(step, total + 1)]
    peak = first / 256
    assert max(rates) <= peak * (1 + 1e-9)
    assert rates[-1] <= 0.01 * peak
    # No step changes it by more than the steepest step of warm-up or cosine at these paces.
    steepest = peak * max(then, first) / NUM_IMAGES * 2.1
    assert all(abs(a - b) <= steepest for a, b in pairwise(rates))


def test_a_length_in_steps_stays_that_number_of_steps() -> None:
    settings = config(train={"steps": 100, "global_batch_size": 32})
    run = Progress.start(pace(16)).at_pace(pace(32), step=40)
    assert run.total_steps(settings) == 100
    assert run.schedule_at(70, settings) == 70
    assert rate_at(100, config=settings, progress=run) == 0


def test_progress_survives_a_checkpoint_and_a_change_there() -> None:
    run = Progress.start(pace(16)).at_pace(pace(32), step=10)
    client = json.loads(json.dumps({PROGRESS_KEY: run.to_json()}))
    assert Progress.from_client(client, step=20, batch_size=32, pace=pace(32)) == run
    back = Progress.from_client(client, step=20, batch_size=32, pace=pace(16))
    assert back.images_at(20) == 10 * 16 + 10 * 32
    assert back.images_at(25) == back.images_at(20) + 5 * 16
    assert back.first_pace == pace(16)


@pytest.mark.parametrize("batch", [8, 16, 32])
def test_a_checkpoint_of_the_first_version_has_one_batch_size(batch: int) -> None:
    run = Progress.from_client(
        {"images_seen": 160}, step=10, batch_size=16, pace=pace(batch)
    )
    assert run.images_at(10) == 160
    assert run.images_at(11) == 160 + batch
    assert run.epochs_at(10) == pytest.approx(160 / NUM_IMAGES)
    assert (run == Progress.start(pace(16))) == (batch == 16)
