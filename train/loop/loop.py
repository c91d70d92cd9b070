"""The training loop and what stands around it: logging, going back, saving, drawing.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from model.objectives.mae import MaskedAutoencoder
from pipeline.errors import DataError
from train.config import RunConfig
from train.engine.optim import lr_at
from train.errors import Preempted
from train.evaluation.held_out import read_held_out
from train.loop.opening import Run, open_run
from train.loop.recovery import SeenBatch, _record_skipped, _roll_back
from train.loop.replicas import check_replicas
from train.loop.saving import _data_report, _finish_save, _save
from train.objectives.mae import _noise, complete
from train.process.lease import RunLease
from train.process.outcome import Outcome, write_json
from train.process.preemption import Preemption
from train.process.watchdog import Watchdog
from train.process.world import World, init_world
from train.report.data_record import DATA_REPORT_FILE, leave_data_report
from train.report.drawing import draw_loss, draw_reconstruction, spread_ids
from train.report.meter import summary_table, throughput_summary
from train.report.metrics_file import (
    LOSS_PICTURE,
    METRICS_FILE,
    RECONSTRUCTION_PICTURE,
    SUMMARY_FILE,
    read_metrics,
)
from train.report.utilisation import utilisation


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
                with Watchdog(
                    timeout_s=config.engine.timeout_s, folder=run_dir, rank=world.rank
                ) as watchdog:
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


# ----------------------------------------------------------------------------------------- the loop
def _loop(run: Run, preemption: Preemption, watchdog: Watchdog) -> None:
    """Take the steps. Nothing here reads a value back from the device unless a line of the log is
    due."""
    config, engine, loader = run.config, run.engine, run.loader
    run.saver.on_wait = watchdog.beat
    batches = iter(loader)
    losses, taken = torch.zeros((), device=engine.device), 0
    done = run.first_step
    while done < run.total_steps:
        micro_batches = []
        for _ in range(engine.grad_accum_steps):
            batch = next(batches)
            loss = engine.forward_backward(
                batch.images_BCHW, _noise(config, batch, device=engine.device)
            )
            micro_batches.append(
                SeenBatch(batch.sample_ids_B, batch.epochs_B, batch.epoch, batch.position, loss)
            )
        lr = lr_at(
            done, config=config, steps_per_epoch=loader.steps_per_epoch, total_steps=run.total_steps
        )
        skipped_before = engine.skipped_steps
        engine.step(lr)
        run.meter.step()
        done = run.outcome.step = done + 1
        run.reporter.advance(done)
        was_taken = engine.skipped_steps == skipped_before
        if was_taken:
            losses, taken = (
                losses + sum(seen.loss for seen in micro_batches) / len(micro_batches),
                taken + 1,
            )
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
        # While steps are being skipped the weights are under suspicion: no checkpoint of them takes
        # a good one's place.
        if (
            last
            or stopping
            or spike
            or (_due(done, config.checkpoint.every_steps) and not run.skips.in_a_row)
        ):
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
        f"stopped ({reasons[0] if reasons else 'asked to'}) and saved at step {run.outcome.step} "
        f"of {run.total_steps}: "
        "the same command line goes on from there"
    )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


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
                config.model,
                images_per_s=rates["images_per_s"],
                world_size=world.world_size,
                peak=run.peak_tflops,
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
            f"warning: step {done}: the loss is {loss:.4g}, usual is {run.spikes.usual_loss:.4g}; "
            "saving an extra "
            "checkpoint and going on"
        )
    return spike


def _draw(run: Run, done: int) -> None:
    """Draw the same held-out images with the same masks as every time before. All ranks enter, rank
    0 draws."""
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
                run.reporter.say(
                    f"held-out loss of {len(ids)} pictures at step {done}: {completion.loss:.4f}"
                )
    if run.world.is_main:
        draw_loss(run.run_dir / LOSS_PICTURE, read_metrics(run.run_dir))
    run.meter.go_on()


# --------------------------------------------------------------------------------------- afterwards
def _memory_gib(device: torch.device) -> float:
    """Give the peak of the device's memory; on the CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def _close(run: Run) -> None:
    """Say where the time went. All ranks enter."""
    report = _data_report(run)
    if not run.world.is_main:
        return
    summary = throughput_summary(
        run.meter.total, run.loader.stats.snapshot(), world_size=run.world.world_size
    )
    lines: list[dict[str, Any]] = read_metrics(run.run_dir)
    final_loss = lines[-1]["loss"] if lines else None
    more = {
        "final_loss": final_loss,
        "bad_samples": report["num_bad"],
        "world_size": run.world.world_size,
    }
    write_json(run.run_dir / SUMMARY_FILE, {**summary, **more})
    if report["num_bad"]:
        run.reporter.say(
            f"{report['num_bad']} bad samples were replaced: see {run.run_dir}/{DATA_REPORT_FILE}"
        )
    run.reporter.say(summary_table(summary))
    run.reporter.say(
        f"done: {run.total_steps} steps; {run.run_dir}/{METRICS_FILE}, {run.run_dir}/{LOSS_PICTURE}"
    )
