"""Skipped steps, and going back to a checkpoint."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from train.errors import NumericsError
from train.loop.guard import Verdict
from train.loop.opening import Run
from train.loop.saving import _finish_save
from train.process.outcome import write_json


# ------------------------------------------------------------------------------- numbers gone wrong
class SeenBatch(NamedTuple):
    """What is remembered of a micro-batch until its step is known to be sound."""

    sample_ids_B: npt.NDArray[np.int64]
    epochs_B: npt.NDArray[np.int64]
    epoch: int
    position: int
    loss: torch.Tensor


def _record_skipped(run: Run, done: int, micro_batches: list[SeenBatch]) -> None:
    """Leave the names of a skipped step's images for a replay, on the ranks whose loss was not
    finite, or on all."""
    rank, first = run.world.rank, micro_batches[0]
    losses = [float(seen.loss) for seen in micro_batches]
    sound = all(math.isfinite(loss) for loss in losses)
    culprits = [number for number, is_sound in enumerate(run.world.gather(sound)) if not is_sound]
    where = f"the loss on rank {', '.join(map(str, culprits))}" if culprits else "a gradient"
    run.reporter.say(
        f"warning: step {done} skipped: {where} is not finite ({run.skips.in_a_row + 1} in a row)"
    )
    if culprits and rank not in culprits:
        return
    write_json(
        run.run_dir
        / f"nonfinite-step-{done:06d}-at-{first.epoch}-{first.position}-rank-{rank}.json",
        {
            "step": done,
            "rank": rank,
            "seed": run.config.train.seed,
            "epoch": first.epoch,
            "position": first.position,
            "sample_ids": [
                number for seen in micro_batches for number in seen.sample_ids_B.tolist()
            ],
            "epochs": [number for seen in micro_batches for number in seen.epochs_B.tolist()],
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
        },
    )


def _roll_back(run: Run, done: int, *, verdict: Verdict) -> int:
    """Take the weights back to the last good checkpoint; the data goes on from here.

    Skipped steps change nothing, so the same data would lead to the same weights: it is passed
    over.

    Returns:
        The checkpoint's step.

    Raises:
        NumericsError: there is no checkpoint, or this was done often enough.
    """
    story = (
        f"step {done}: {run.skips.in_a_row} steps in a row had a loss or gradient that is not "
        "finite and were skipped; "
        f"their images are named in {run.run_dir}/nonfinite-step-*.json"
    )
    remedy = (
        "Lower optim.base_lr, set optim.grad_clip or use engine.precision autocast or fp32, "
        "and run again"
    )
    if verdict == "stop":
        raise NumericsError(
            f"{story}. The run went back {run.skips.roll_backs} times already. {remedy}"
        )
    if run.saver.pending is not None:
        _finish_save(run)
    first_skipped = done - run.skips.in_a_row
    state = run.store.latest(run.world, before=first_skipped + 1)
    if state is not None and state.step == run.skips.target:  # tried before, and it led here again
        state = run.store.latest(run.world, before=state.step) or state
    if state is None:
        raise NumericsError(f"{story}. There is no checkpoint from before to go back to. {remedy}")
    run.engine.restore(state)
    run.skips.rolled_back(state.step)
    run.reporter.rewind(state.step)
    place = run.loader.state_dict()
    run.reporter.say(
        f"warning: {story}; back to the weights of step {state.step} ({run.skips.roll_backs} of "
        f"{run.config.guard.roll_backs} times), on to the images behind them (epoch "
        f"{place['epoch']}, position "
        f"{place['position']})"
    )
    run.outcome.step = state.step
    return state.step
