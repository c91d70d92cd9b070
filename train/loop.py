"""The training loop and what stands around it: opening, resuming, logging, saving, drawing.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from model.mae import MaskedAutoencoder
from pipeline.augment import mask_noise
from pipeline.loader import Batch, Loader
from pipeline.manifest import Manifest, open_dataset
from pipeline.storage import redact
from train.checkpoint import CheckpointState, CheckpointStore, CheckpointWriteError
from train.config import RunConfig
from train.distributed import World, init_world
from train.engine import Engine, build_engine, render_deepspeed_config
from train.errors import NumericsError, Preempted
from train.held_out import read_held_out
from train.metrics import (
    LOSS_PICTURE,
    METRICS_FILE,
    RECONSTRUCTION_PICTURE,
    SUMMARY_FILE,
    Meter,
    Reporter,
    read_metrics,
    summary_table,
    throughput_summary,
)
from train.optim import lr_at
from train.outcome import Outcome, write_json
from train.pictures import complete, draw_loss, draw_reconstruction, spread_ids
from train.preemption import Preemption
from train.run_lease import RunLease
from train.settings_text import to_toml
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
        run = _open_run(config, world=world, outcome=outcome)
        if run is not None:
            try:
                with Watchdog(timeout_s=config.engine.timeout_s, folder=run_dir, rank=world.rank) as watchdog:
                    _loop(run, preemption, watchdog)
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


@dataclass
class _Run:
    """Everything the loop works with."""

    config: RunConfig
    world: World
    outcome: Outcome
    run_dir: Path
    loader: Loader
    held_out: Manifest | None
    engine: Engine
    store: CheckpointStore
    reporter: Reporter
    meter: Meter
    first_step: int
    total_steps: int
    failed_saves: int = 0


# ------------------------------------------------------------------------------------------------ the loop


def _loop(run: _Run, preemption: Preemption, watchdog: Watchdog) -> None:
    """Take the steps. Nothing here reads a value back from the device unless a line of the log is due."""
    config, engine, loader = run.config, run.engine, run.loader
    batches = iter(loader)
    losses, logged_step = torch.zeros((), device=engine.device), run.first_step
    for step in range(run.first_step, run.total_steps):
        for _ in range(engine.grad_accum_steps):
            batch = next(batches)
            losses += engine.forward_backward(batch.images_BCHW, _noise(config, batch, device=engine.device))
        lr = lr_at(step, config=config, steps_per_epoch=loader.steps_per_epoch, total_steps=run.total_steps)
        engine.step(lr)
        run.meter.step()
        done = run.outcome.step = step + 1
        run.reporter.advance(done)
        last = done == run.total_steps
        stopping = preemption.requested()

        if last or stopping or _due(done, config.log.every_steps):
            _log(run, done, lr=lr, mean_loss=losses / (engine.grad_accum_steps * (done - logged_step)), batch=batch)
            losses, logged_step = torch.zeros_like(losses), done
        if last or stopping or _due(done, config.checkpoint.every_steps):
            _save(run, done)
        if last or _due(done, config.log.pictures_every_steps):
            _draw(run, done)
        if stopping and not last:
            preemption.disarm()
            raise Preempted(_stop_message(run, preemption.reason))
        watchdog.beat()
    _close(run)


def _stop_message(run: _Run, reason: str) -> str:
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


def _log(run: _Run, done: int, *, lr: float, mean_loss: torch.Tensor, batch: Batch) -> None:
    """Average over the ranks, check that training is sound, and write one line."""
    config, world, loader = run.config, run.world, run.loader
    window = run.meter.close_window(wait_s=loader.wait_s)
    rates = window.rates()
    loss, rates["data_wait_share"] = world.mean([float(mean_loss), rates["data_wait_share"]])
    _check_numbers(run, done, loss=loss, batch=batch)
    run.reporter.log(
        {
            "step": done,
            "epoch": done / loader.steps_per_epoch,
            "images_seen": done * config.train.global_batch_size,
            "loss": loss,
            "lr": lr,
            "grad_norm": run.engine.grad_norm(),
            **rates,
            "skipped_steps": run.engine.skipped_steps,
            "loss_scale": run.engine.loss_scale,
            "memory_gib": _memory_gib(run.engine.device),
        }
    )
    if world.is_main:
        run.outcome.write("running", exit_code=None, total_steps=run.total_steps)


def _check_numbers(run: _Run, done: int, *, loss: float, batch: Batch) -> None:
    """Stop where the mean loss is not finite, and leave the batch's names for a replay. All ranks see one loss."""
    if math.isfinite(loss):
        return
    rank = run.world.rank
    path = run.run_dir / f"nonfinite-step-{done:06d}-rank-{rank}.json"
    samples = {"sample_ids": batch.sample_ids_B.tolist(), "epochs": batch.epochs_B.tolist()}
    write_json(path, {"step": done, "seed": run.config.train.seed, "position": batch.position, **samples})
    raise NumericsError(
        f"step {done}: the mean loss since the last line is {loss}, {run.engine.skipped_steps} steps were skipped. "
        f"The last batch is named in {run.run_dir}/nonfinite-step-{done:06d}-rank-*.json. The newest checkpoint is "
        "from before: lower optim.base_lr, set optim.grad_clip or use engine.precision autocast or fp32, and run again"
    )


def _save(run: _Run, done: int) -> None:
    """Save; a failure is a warning until it repeats, because the last good checkpoint is still there."""
    run.meter.pause()
    client = {
        "step": done,
        "images_seen": done * run.config.train.global_batch_size,
        "total_steps": run.total_steps,
        "loader": run.loader.state_dict(),
    }
    try:
        uri = run.store.save(done, run.engine, client, world=run.world)
        run.failed_saves = 0
        run.reporter.say(f"saved step {done} to {redact(uri)}")
    except CheckpointWriteError as error:
        run.failed_saves += 1
        if run.failed_saves >= SAVE_FAILURES_ALLOWED or done == run.total_steps:
            raise
        run.reporter.say(f"warning: {error}; training goes on ({run.failed_saves} of {SAVE_FAILURES_ALLOWED} allowed)")
    run.meter.go_on()


def _draw(run: _Run, done: int) -> None:
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


# ------------------------------------------------------------------------------------------------ before and after


def _open_run(config: RunConfig, *, world: World, outcome: Outcome) -> _Run | None:
    """Open data, model, engine and reports at the newest checkpoint; None where the run is finished already."""
    dataset = _open_together(config.data.train, world=world)
    held_out = _open_together(config.data.val, world=world) if config.data.val else None
    loader = Loader(
        dataset,
        config.view,
        config.order,
        config.loader,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.world_size,
        local_world_size=world.local_world_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        device=world.device,
        # fp32 even for bf16 weights: the target is made from these pixels.
        dtype=torch.float32,
    )
    total_steps = count_steps(config, steps_per_epoch=loader.steps_per_epoch)
    checkpoint, keep = config.checkpoint, config.checkpoint.keep_last
    store = CheckpointStore(config.checkpoint_dir, keep_last=keep, keep_every=checkpoint.keep_every)
    state = store.latest(world)
    first_step = outcome.step = state.step if state is not None else 0
    if state is not None and first_step >= total_steps:
        loader.close()
        if world.is_main:
            sys.stdout.write(f"finished: step {first_step} of {total_steps} is in {redact(state.uri)}; nothing to do\n")
        return None
    torch.manual_seed(config.train.seed)
    engine = build_engine(config, model=MaskedAutoencoder(config.model), resume=state, world=world)
    if state is not None:
        loader.load_state_dict(state.client["loader"])
    run_dir = Path(config.run_dir)
    if world.is_main:
        _write_settings(config, run_dir, world_size=world.world_size)
    reporter = Reporter(
        run_dir,
        rank=world.rank,
        total_steps=total_steps,
        resumed_step=first_step,
        tensorboard=config.log.tensorboard,
    )
    reporter.say(_opening_line(config, world, dataset, state, total_steps=total_steps))
    meter = Meter(global_batch_size=config.train.global_batch_size)
    return _Run(
        config, world, outcome, run_dir, loader, held_out, engine, store, reporter, meter, first_step, total_steps
    )


def count_steps(config: RunConfig, *, steps_per_epoch: float) -> int:
    """Derive the run's number of optimizer steps from `train.steps` or `train.epochs`."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None, "the settings give exactly one of the two"
    return max(1, round(config.train.epochs * steps_per_epoch))


def _open_together(uri: str, *, world: World) -> Manifest:
    """Open a dataset on rank 0 first: where it has to be scanned, it is scanned once and then found by the others."""
    dataset = open_dataset(uri) if world.is_main else None
    world.barrier()
    return dataset or open_dataset(uri)


def _opening_line(
    config: RunConfig, world: World, dataset: Manifest, state: CheckpointState | None, *, total_steps: int
) -> str:
    ranks = f"{world.world_size} rank{'s' if world.world_size > 1 else ''} on {world.device.type}"
    data = f"{dataset.info.num_samples:,} images in {dataset.info.num_shards} shards"
    if state is None:
        return f"starting {config.run.name or config.recipe}: {total_steps} steps, {data}, {ranks}"
    seen = state.client.get("images_seen", 0)
    return (
        f"resumed from step {state.step} (images_seen {seen:,}) of {redact(state.uri)}: to step {total_steps}, {ranks}"
    )


def _write_settings(config: RunConfig, run_dir: Path, *, world_size: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
    if config.engine.kind == "deepspeed":
        write_json(run_dir / "ds_config.json", render_deepspeed_config(config, world_size=world_size))


def _memory_gib(device: torch.device) -> float:
    """Give the peak of the device's memory; on the CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def _close(run: _Run) -> None:
    """Say where the time went."""
    if not run.world.is_main:
        return
    summary = throughput_summary(run.meter.total, run.loader.stats.snapshot(), world_size=run.world.world_size)
    lines: list[dict[str, Any]] = read_metrics(run.run_dir)
    final_loss = lines[-1]["loss"] if lines else None
    report = run.loader.report.to_json()
    more = {"final_loss": final_loss, "bad_samples": report["num_bad"], "world_size": run.world.world_size}
    write_json(run.run_dir / SUMMARY_FILE, {**summary, **more})
    if report["num_bad"]:
        (run.run_dir / "data-report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        run.reporter.say(f"{report['num_bad']} bad samples were replaced: see {run.run_dir}/data-report.json")
    run.reporter.say(summary_table(summary))
    run.reporter.say(f"done: {run.total_steps} steps; {run.run_dir}/{METRICS_FILE}, {run.run_dir}/{LOSS_PICTURE}")
