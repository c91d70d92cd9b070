"""The training loop and what stands around it: logging, going back, saving, drawing.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch

from model.mae import MaskedAutoencoder
from pipeline.augment import mask_noise
from pipeline.errors import DataError
from pipeline.loader import Batch
from pipeline.storage import redact
from train.checkpoint import CheckpointWriteError
from train.config import RunConfig
from train.distributed import World, init_world
from train.errors import NumericsError, Preempted
from train.guard import Verdict
from train.held_out import read_held_out
from train.metrics import (
    LOSS_PICTURE,
    METRICS_FILE,
    RECONSTRUCTION_PICTURE,
    SUMMARY_FILE,
    read_metrics,
    summary_table,
    throughput_summary,
)
from train.opening import Run, open_run
from train.optim import lr_at
from train.outcome import Outcome, write_json
from train.pictures import complete, draw_loss, draw_reconstruction, spread_ids
from train.preemption import Preemption
from train.replicas import check_replicas
from train.run_data import DATA_REPORT_FILE, collect_data_report, leave_data_report
from train.run_lease import RunLease
from train.utilisation import utilisation
from train.watchdog import Watchdog

SAVE_FAILURES_ALLOWED = 3
"""Saves in a row that may fail before the run stops: a full disk may be emptied, a lost one will not come back."""


def train(config: RunConfig, outcome: Outcome) -> None:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        config: checked settings.
        outcome: told the step as it advances.

    Raises:
        MaelstromError: whatever ends a run early; see `train.errors`.
    """
    world = init_world(config)
    run_dir = Path(config.run_dir)
    with Preemption(world) as preemption, _hold(run_dir, world=world, outcome=outcome):
        if world.is_main:
            outcome.write("running", exit_code=None)
        run = open_run(config, world=world, outcome=outcome)
        if run is not None:
            try:
                with Watchdog(timeout_s=config.engine.timeout_s, folder=run_dir, rank=world.rank) as watchdog:
                    _loop(run, preemption, watchdog)
            except DataError:
                leave_data_report(run.loader.report, run_dir=run_dir, rank=world.rank)
                raise
            finally:
                run.reporter.close()
                run.loader.close()
        preemption.disarm()
    world.end()


@contextmanager
def _hold(run_dir: Path, *, world: World, outcome: Outcome) -> Iterator[None]:
    """Hold the run folder for this job; whoever finds it taken must not touch its status either."""
    outcome.in_use = True
    with RunLease(run_dir, world=world):
        outcome.in_use = False
        yield


# ------------------------------------------------------------------------------------------------ the loop


def _loop(run: Run, preemption: Preemption, watchdog: Watchdog) -> None:
    """Take the steps. Nothing here reads a value back from the device unless a line of the log is due."""
    config, engine, loader = run.config, run.engine, run.loader
    run.saver.on_wait = watchdog.beat
    batches = iter(loader)
    losses, taken = torch.zeros((), device=engine.device), 0
    done = run.first_step
    while done < run.total_steps:
        micro_batches = []
        for _ in range(engine.grad_accum_steps):
            batch = next(batches)
            loss = engine.forward_backward(batch.images_BCHW, _noise(config, batch, device=engine.device))
            micro_batches.append(SeenBatch(batch.sample_ids_B, batch.epochs_B, batch.epoch, batch.position, loss))
        lr = lr_at(done, config=config, steps_per_epoch=loader.steps_per_epoch, total_steps=run.total_steps)
        skipped_before = engine.skipped_steps
        engine.step(lr)
        run.meter.step()
        done = run.outcome.step = done + 1
        run.reporter.advance(done)
        was_taken = engine.skipped_steps == skipped_before
        if was_taken:
            losses, taken = losses + sum(seen.loss for seen in micro_batches) / len(micro_batches), taken + 1
        if not (was_taken or engine.searches_loss_scale):
            _record_skipped(run, done, micro_batches)
        verdict = run.skips.judge("taken" if was_taken or engine.searches_loss_scale else "skipped")
        if verdict in ("roll-back", "stop"):
            done = _roll_back(run, done, verdict=verdict)
            losses, taken = torch.zeros_like(losses), 0
            watchdog.beat()
            continue
        last = done == run.total_steps
        stopping = preemption.requested()
        spike = False

        if last or stopping or _due(done, config.log.every_steps):
            spike = _log(run, done, lr=lr, mean_loss=losses / taken)
            losses, taken = torch.zeros_like(losses), 0
        if _due(done, config.guard.checksum_every_steps) and config.engine.zero_stage < 3:
            check_replicas(engine.module, world=run.world, step=done)
        # While steps are being skipped the weights are under suspicion: no checkpoint of them takes a good one's place.
        if last or stopping or spike or (_due(done, config.checkpoint.every_steps) and not run.skips.in_a_row):
            _save(run, done, wait=last or stopping)
        elif run.saver.is_ready():
            _finish_save(run)
        if last or _due(done, config.log.pictures_every_steps):
            _draw(run, done)
        if stopping and not last:
            preemption.disarm()
            raise Preempted(_stop_message(run, preemption.reason))
        watchdog.beat()
    _close(run)


def _stop_message(run: Run, reason: str) -> str:
    reasons = [text for text in run.world.gather(reason) if text]
    return (
        f"stopped ({reasons[0] if reasons else 'asked to'}) and saved at step {run.outcome.step} of {run.total_steps}: "
        "the same command line goes on from there"
    )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _noise(config: RunConfig, batch: Batch, *, device: torch.device) -> torch.Tensor:
    noise_BN = mask_noise(config.train.seed, batch.epochs_B, batch.sample_ids_B, config.model.num_patches)
    return torch.from_numpy(noise_BN).to(device, non_blocking=True)


def _log(run: Run, done: int, *, lr: float, mean_loss: torch.Tensor) -> bool:
    """Average over the ranks and write one line; tell whether a spike of the loss begins here."""
    config, world, loader = run.config, run.world, run.loader
    window = run.meter.close_window(wait_s=loader.wait_s)
    rates = window.rates()
    means = world.mean([float(mean_loss), rates["data_wait_share"], float(loader.report.num_bad)])
    loss, rates["data_wait_share"], bad_samples = means
    run.reporter.log(
        {
            "step": done,
            "epoch": done / loader.steps_per_epoch,
            "images_seen": done * config.train.global_batch_size,
            "loss": loss,
            "lr": lr,
            "grad_norm": run.engine.grad_norm(),
            **rates,
            **utilisation(
                config.model, images_per_s=rates["images_per_s"], world_size=world.world_size, peak=run.peak_tflops
            ),
            "bad_samples": round(bad_samples * world.world_size),
            "skipped_steps": run.engine.skipped_steps,
            "roll_backs": run.skips.roll_backs,
            "loss_scale": run.engine.loss_scale,
            "memory_gib": _memory_gib(run.engine.device),
        }
    )
    if world.is_main:
        run.outcome.write("running", exit_code=None, total_steps=run.total_steps)
    spike = run.spikes.begins(loss)
    if spike:
        run.reporter.say(
            f"warning: step {done}: the loss is {loss:.4g}, usual is {run.spikes.usual_loss:.4g}; saving an extra "
            "checkpoint and going on"
        )
    return spike


# ------------------------------------------------------------------------------------------------ numbers gone wrong


class SeenBatch(NamedTuple):
    """What is remembered of a micro-batch until its step is known to be sound."""

    sample_ids_B: npt.NDArray[np.int64]
    epochs_B: npt.NDArray[np.int64]
    epoch: int
    position: int
    loss: torch.Tensor


def _record_skipped(run: Run, done: int, micro_batches: list[SeenBatch]) -> None:
    """Leave the names of a skipped step's images for a replay, on the ranks whose loss was not finite, or on all."""
    rank, first = run.world.rank, micro_batches[0]
    losses = [float(seen.loss) for seen in micro_batches]
    sound = all(math.isfinite(loss) for loss in losses)
    culprits = [number for number, is_sound in enumerate(run.world.gather(sound)) if not is_sound]
    where = f"the loss on rank {', '.join(map(str, culprits))}" if culprits else "a gradient"
    run.reporter.say(f"warning: step {done} skipped: {where} is not finite ({run.skips.in_a_row + 1} in a row)")
    if culprits and rank not in culprits:
        return
    write_json(
        run.run_dir / f"nonfinite-step-{done:06d}-at-{first.epoch}-{first.position}-rank-{rank}.json",
        {
            "step": done,
            "rank": rank,
            "seed": run.config.train.seed,
            "epoch": first.epoch,
            "position": first.position,
            "sample_ids": [number for seen in micro_batches for number in seen.sample_ids_B.tolist()],
            "epochs": [number for seen in micro_batches for number in seen.epochs_B.tolist()],
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
        },
    )


def _roll_back(run: Run, done: int, *, verdict: Verdict) -> int:
    """Take the weights back to the last good checkpoint; the data goes on from here.

    Skipped steps change nothing, so the same data would lead to the same weights: it is passed over.

    Returns:
        The checkpoint's step.

    Raises:
        NumericsError: there is no checkpoint, or this was done often enough.
    """
    story = (
        f"step {done}: {run.skips.in_a_row} steps in a row had a loss or gradient that is not finite and were skipped; "
        f"their images are named in {run.run_dir}/nonfinite-step-*.json"
    )
    remedy = "Lower optim.base_lr, set optim.grad_clip or use engine.precision autocast or fp32, and run again"
    if verdict == "stop":
        raise NumericsError(f"{story}. The run went back {run.skips.roll_backs} times already. {remedy}")
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
        f"{run.config.guard.roll_backs} times), on to the images behind them (epoch {place['epoch']}, position "
        f"{place['position']})"
    )
    run.outcome.step = state.step
    return state.step


# ------------------------------------------------------------------------------------------------ saving, drawing


def _save(run: Run, done: int, *, wait: bool) -> None:
    """Begin a save, after the one before is done; `wait` for its end where the run ends here."""
    if run.saver.pending is not None:
        _finish_save(run)
    run.meter.pause()
    client = {
        "step": done,
        "images_seen": done * run.config.train.global_batch_size,
        "total_steps": run.total_steps,
        "loader": run.loader.state_dict(),
        "data_report": _data_report(run),
    }
    run.saver.start(done, run.engine, client)
    if wait or run.config.checkpoint.mode == "sync":
        _finish_save(run, failure="raise" if wait else "warn")
    run.meter.go_on()


def _finish_save(run: Run, *, failure: Literal["warn", "raise"] = "warn") -> None:
    """Take in a save's outcome; a failure is a warning until it repeats: the last good checkpoint is still there."""
    try:
        saved = run.saver.finish()
    except CheckpointWriteError as error:
        run.failed_saves += 1
        if run.failed_saves >= SAVE_FAILURES_ALLOWED or failure == "raise":
            raise
        run.reporter.say(f"warning: {error}; training goes on ({run.failed_saves} of {SAVE_FAILURES_ALLOWED} allowed)")
        return
    if saved is not None:
        run.failed_saves = 0
        run.reporter.say(f"saved step {saved.step} to {redact(saved.uri)} (training waited {saved.stall_s:.2f} s)")


def _draw(run: Run, done: int) -> None:
    """Draw the same held-out images with the same masks as every time before. All ranks enter, rank 0 draws."""
    count = run.config.log.num_pictures
    run.meter.pause()
    if run.held_out is not None and count:
        with run.engine.eval_context() as module:
            if run.world.is_main:
                assert isinstance(module, MaskedAutoencoder)
                ids = spread_ids(run.held_out.info.num_samples, count)
                images = read_held_out(run.config, run.held_out, ids, device=run.engine.device)
                completion = complete(module, images.images_BCHW, images.noise_BN)
                path = run.run_dir / RECONSTRUCTION_PICTURE
                draw_reconstruction(path, completion, title=f"held-out images after step {done}")
                run.reporter.picture("reconstruction", path, done)
                run.reporter.say(f"held-out loss of {len(ids)} pictures at step {done}: {completion.loss:.4f}")
    if run.world.is_main:
        draw_loss(run.run_dir / LOSS_PICTURE, read_metrics(run.run_dir))
    run.meter.go_on()


# ------------------------------------------------------------------------------------------------ afterwards


def _memory_gib(device: torch.device) -> float:
    """Give the peak of the device's memory; on the CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def _data_report(run: Run) -> dict[str, Any]:
    return collect_data_report(run.loader.report, run_dir=run.run_dir, world=run.world, earlier=run.earlier_data_report)


def _close(run: Run) -> None:
    """Say where the time went. All ranks enter."""
    report = _data_report(run)
    if not run.world.is_main:
        return
    summary = throughput_summary(run.meter.total, run.loader.stats.snapshot(), world_size=run.world.world_size)
    lines: list[dict[str, Any]] = read_metrics(run.run_dir)
    final_loss = lines[-1]["loss"] if lines else None
    more = {"final_loss": final_loss, "bad_samples": report["num_bad"], "world_size": run.world.world_size}
    write_json(run.run_dir / SUMMARY_FILE, {**summary, **more})
    if report["num_bad"]:
        run.reporter.say(f"{report['num_bad']} bad samples were replaced: see {run.run_dir}/{DATA_REPORT_FILE}")
    run.reporter.say(summary_table(summary))
    run.reporter.say(f"done: {run.total_steps} steps; {run.run_dir}/{METRICS_FILE}, {run.run_dir}/{LOSS_PICTURE}")
