"""Skipped steps, and going back to a checkpoint.

Shapes: B images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from train.checkpoint.state import CheckpointState
from train.errors import NumericsError
from train.loop.guard import Reaction
from train.loop.opening import Run
from train.loop.resuming import progress_of
from train.loop.saving import finish_save
from train.process.outcome import write_json


class SeenBatch(NamedTuple):
    """What is remembered of a micro-batch until its step is known to be sound."""

    sample_ids_B: npt.NDArray[np.int64]
    epochs_B: npt.NDArray[np.int64]
    epoch: int
    position: int
    loss: torch.Tensor


def record_skipped(run: Run, done: int, micro_batches: list[SeenBatch]) -> None:
    """Leave the names of a skipped step's images for a replay, on the ranks whose loss was not
    finite, or on all. All ranks enter.

    Args:
        run: the run.
        done: number of the step.
        micro_batches: of this rank.
    """
    # Reading the losses waits for the device, which is fine here: the step was lost anyway.
    losses = [float(seen.loss) for seen in micro_batches]
    is_sound = all(math.isfinite(loss) for loss in losses)
    sound_by_rank = run.world.gather(is_sound)
    culprits = [rank for rank, sound in enumerate(sound_by_rank) if not sound]
    # With finite losses everywhere the overflow was in a gradient, and no rank is told apart.
    what = "a gradient"
    if culprits:
        ranks = ", ".join(str(rank) for rank in culprits)
        what = f"the loss on rank {ranks}"
    # The guard counts this step only after it was told.
    in_a_row = run.skips.in_a_row + 1
    run.reporter.say(
        f"warning: step {done} skipped: {what} is not finite ({in_a_row} in a row)"
    )
    if not culprits or run.world.rank in culprits:
        with run.reporter.tolerating("nonfinite-step-*.json"):
            _write_skipped(run, done, micro_batches, losses)


def _write_skipped(
    run: Run, done: int, micro_batches: list[SeenBatch], losses: list[float]
) -> None:
    rank = run.world.rank
    first = micro_batches[0]
    sample_ids: list[int] = []
    epochs: list[int] = []
    for seen in micro_batches:
        sample_ids += seen.sample_ids_B.tolist()
        epochs += seen.epochs_B.tolist()
    # Epoch and position are in the name because a step's number comes again after a roll-back.
    name = (
        f"nonfinite-step-{done:06d}-at-{first.epoch}-{first.position}-rank-{rank}.json"
    )
    write_json(
        run.run_dir / name,
        {
            "step": done,
            "rank": rank,
            "seed": run.config.train.seed,
            "epoch": first.epoch,
            "position": first.position,
            "sample_ids": sample_ids,
            "epochs": epochs,
            # JSON has no NaN and no infinity.
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
        },
    )


def roll_back(run: Run, done: int, *, reaction: Reaction) -> int:
    """Take the weights back to the last good checkpoint; the data goes on from here.

    Skipped steps change no weight, so the same data would lead to the same weights: it is passed
    over.

    Args:
        run: the run.
        done: number of the last step, which was skipped.
        reaction: roll-back, or stop if the run went back often enough.

    Returns:
        The checkpoint's step.

    Raises:
        NumericsError: there is no checkpoint, or this was done often enough.
    """
    story = (
        f"step {done}: {run.skips.in_a_row} steps in a row had a loss or gradient that is not "
        f"finite and were skipped; their images are named in {run.run_dir}/nonfinite-step-*.json"
    )
    remedy = (
        "Use engine.precision autocast or fp32, or lower optim.base_lr or set optim.grad_clip with "
        "--resume.accept optim.base_lr,optim.grad_clip, and run again"
    )
    if reaction == "stop":
        raise NumericsError(
            f"{story}. The run went back {run.skips.roll_backs} times already. {remedy}"
        )

    # The save under way may be the checkpoint to go back to.
    if run.saver.pending is not None:
        finish_save(run)
    state = _find_good_checkpoint(run, first_skipped=done - run.skips.in_a_row)
    if state is None:
        raise NumericsError(
            f"{story}. There is no checkpoint from before to go back to. {remedy}"
        )

    run.engine.restore(state)
    run.skips.rolled_back(state.step)
    run.reporter.rewind(state.step)
    run.outcome.step = state.step
    # The checkpoint may be from before a change of the batch size.
    run.progress = progress_of(state, run.progress.pace)
    run.total_steps = run.progress.total_steps(run.config)
    cursor = run.loader.state_dict()
    run.reporter.say(
        f"warning: {story}; back to the weights of step {state.step} ({run.skips.roll_backs} of "
        f"{run.config.guard.roll_backs} times), on to the images behind them (epoch "
        f"{cursor['epoch']}, position {cursor['position']})"
    )
    return state.step


def _find_good_checkpoint(run: Run, *, first_skipped: int) -> CheckpointState | None:
    state = run.store.latest(run.world, before=first_skipped + 1)
    if state is None or state.step != run.skips.target:
        return state
    # Going back to this one led here again: an older one, if there is one.
    return run.store.latest(run.world, before=state.step) or state
