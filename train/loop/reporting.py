"""What a run tells while it goes on: lines of metrics, pictures, and a summary at the end.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from train.evaluation.held_out import read_held_out
from train.loop.opening import Run
from train.loop.saving import merge_data_reports
from train.process.outcome import write_json
from train.report.data_record import DATA_REPORT_FILE
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


class MeanLoss:
    """Mean loss over the steps that were taken since it was last read.

    The sum stays on the device: adding to it does not wait for the step, reading it does.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._steps = 0

    def add(self, losses: Sequence[Tensor]) -> None:
        """Add one step.

        Args:
            losses: of its micro-batches, scalars.
        """
        self._sum = self._sum + sum(losses) / len(losses)
        self._steps += 1

    def clear(self) -> None:
        """Start over."""
        self._sum = torch.zeros_like(self._sum)
        self._steps = 0

    def read(self) -> float | None:
        """Give the mean and start over; None if no step was taken."""
        mean = float(self._sum / self._steps) if self._steps else None
        self.clear()
        return mean


def log_line(run: Run, done: int, *, lr: float, mean_loss: MeanLoss) -> bool:
    """Average over the ranks and write one line of metrics. All ranks enter.

    Args:
        run: the run.
        done: optimizer steps done, skipped ones included.
        lr: learning rate of the last step.
        mean_loss: read here, and started over.

    Returns:
        Whether a spike of the loss begins here.
    """
    world, loader = run.world, run.loader
    # The window ends before the loss is read: reading waits for the device, and that wait belongs
    # to the next window's steps, which run meanwhile.
    window = run.meter.close_window(wait_s=loader.wait_s)
    rates = window.rates()

    # Steps are skipped on all ranks together, so either every rank has a loss or none has.
    own_loss = mean_loss.read()
    sent_loss = 0.0 if own_loss is None else own_loss
    bad_on_rank = float(loader.report.num_bad)
    # One agreement for all three: each costs a round trip between the ranks.
    sent = [sent_loss, rates["data_wait_share"], bad_on_rank]
    average_loss, wait_share, bad_per_rank = world.mean(sent)
    rates["data_wait_share"] = wait_share
    loss = None if own_loss is None else average_loss

    arithmetic = utilisation(
        run.objective.train_flops(),
        images_per_s=rates["images_per_s"],
        world_size=world.world_size,
        peak=run.peak_tflops,
    )
    run.reporter.log(
        {
            "step": done,
            "epoch": run.progress.epochs_at(done),
            "images_seen": run.progress.images_at(done),
            "loss": loss,
            "lr": lr,
            "grad_norm": run.engine.grad_norm(),
            **rates,
            **arithmetic,
            "bad_samples": round(bad_per_rank * world.world_size),
            "skipped_steps": run.engine.skipped_steps,
            "roll_backs": run.skips.roll_backs,
            "loss_scale": run.engine.loss_scale,
            "memory_gib": _memory_gib(run.engine.device),
        }
    )
    if world.is_main:
        run.outcome.write("running", exit_code=None, total_steps=run.total_steps)

    is_spike = loss is not None and run.spikes.begins(loss)
    if is_spike:
        run.reporter.say(
            f"warning: step {done}: the loss is {loss:.4g}, usual is {run.spikes.usual_loss:.4g}; "
            "saving an extra checkpoint and going on"
        )
    return is_spike


def draw_pictures(run: Run, done: int) -> None:
    """Draw the loss, and the same held-out images with the same draws as every time before. All
    ranks enter, rank 0 draws."""
    run.meter.pause()
    if run.held_out is not None and run.config.log.num_pictures:
        # All ranks enter the context even though one draws: at ZeRO 3 it gathers the weights.
        with run.engine.eval_context() as module:
            if run.world.is_main:
                with run.reporter.tolerating(RECONSTRUCTION_PICTURE):
                    _draw_held_out(run, module, done)
    if run.world.is_main:
        with run.reporter.tolerating(LOSS_PICTURE):
            draw_loss(run.run_dir / LOSS_PICTURE, read_metrics(run.run_dir))
    run.meter.go_on()


def _draw_held_out(run: Run, module: torch.nn.Module, done: int) -> None:
    assert run.held_out is not None
    ids_B = spread_ids(run.held_out.info.num_samples, run.config.log.num_pictures)
    device = run.engine.device
    batch = read_held_out(run.config, run.objective, run.held_out, ids_B, device=device)
    completion = run.objective.pictures(module, batch)
    if completion is None:
        return
    # One file that is replaced: TensorBoard and the trackers keep the earlier ones.
    path = run.run_dir / RECONSTRUCTION_PICTURE
    draw_reconstruction(path, completion, title=f"held-out images after step {done}")
    run.reporter.picture("reconstruction", path, done)
    run.reporter.say(
        f"held-out loss of {len(ids_B)} pictures at step {done}: {completion.loss:.4f}"
    )


def conclude(run: Run) -> None:
    """Write the summary and say where the time went. All ranks enter."""
    report = merge_data_reports(run)
    if not run.world.is_main:
        return
    # Rank 0's stages stand for all: every rank reads and decodes the same number of images.
    stages = run.loader.stats.snapshot()
    world_size = run.world.world_size
    summary = throughput_summary(run.meter.total, stages, world_size=world_size)
    lines: list[dict[str, Any]] = read_metrics(run.run_dir)
    more = {
        "final_loss": lines[-1]["loss"] if lines else None,
        "bad_samples": report["num_bad"],
        "world_size": world_size,
    }
    with run.reporter.tolerating(SUMMARY_FILE):
        write_json(run.run_dir / SUMMARY_FILE, {**summary, **more})
    if report["num_bad"]:
        run.reporter.say(
            f"{report['num_bad']} bad samples were replaced: see {run.run_dir}/{DATA_REPORT_FILE}"
        )
    run.reporter.say(summary_table(summary))
    run.reporter.say(
        f"done: {run.total_steps} steps; {run.run_dir}/{METRICS_FILE}, {run.run_dir}/{LOSS_PICTURE}"
    )


def _memory_gib(device: torch.device) -> float:
    """Give the peak of the device's memory; on the CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    memory = psutil.Process().memory_info()
    return float(memory.rss) / 2**30
