"""Opening a run: data, model, engine, checkpoints and reports, brought to its newest
checkpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset import Manifest, open_dataset
from pipeline.loader import Loader
from pipeline.storage import redact
from train.checkpoint.saver import Saver
from train.checkpoint.state import CheckpointState
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import build_engine
from train.engine.deepspeed_config import render_deepspeed_config
from train.loop.guard import SkipGuard, SpikeGuard
from train.objectives.base import Objective
from train.process.outcome import Outcome, write_json
from train.process.world import World
from train.report.data_record import keep_description, kept_description
from train.report.meter import Meter
from train.report.reporter import Reporter
from train.report.trackers import check_trackers, start_trackers
from train.report.utilisation import peak_tflops
from train.settings.lengths import refuse_lengths, total_steps_of
from train.settings.text import to_toml


@dataclass
class Run:
    """Everything the loop works with."""

    config: RunConfig
    objective: Objective
    world: World
    outcome: Outcome
    run_dir: Path
    loader: Loader
    held_out: Manifest | None
    engine: Engine
    store: CheckpointStore
    saver: Saver
    reporter: Reporter
    meter: Meter
    skips: SkipGuard
    spikes: SpikeGuard
    first_step: int
    total_steps: int
    earlier_data_report: dict[str, Any] | None
    peak_tflops: float | None = None
    failed_saves: int = 0


def open_run(
    config: RunConfig, objective: Objective, *, world: World, outcome: Outcome
) -> Run | None:
    """Open data, model, engine and reports at the newest checkpoint. All ranks enter.

    Args:
        config: checked settings.
        objective: what is learned.
        world: the processes of the run.
        outcome: told the step.

    Returns:
        The run; None if it is finished already.
    """
    check_trackers(config)
    run_dir = Path(config.run_dir)

    # Data first: the number of steps may depend on the size of the dataset.
    dataset = _open_together(config.data.train, world=world)
    held_out = _open_together(config.data.val, world=world) if config.data.val else None
    loader = _open_loader(config, objective, dataset, world=world)
    total_steps = count_steps(config, steps_per_epoch=loader.steps_per_epoch)

    # The newest checkpoint, if there is one.
    store = CheckpointStore(
        config.checkpoint_dir,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )
    state = store.latest(world)
    first_step = state.step if state is not None else 0
    outcome.step = first_step
    if state is not None and first_step >= total_steps:
        loader.close()
        if world.is_main:
            sys.stdout.write(
                f"finished: step {first_step} of {total_steps} is in {redact(state.uri)}; there is "
                "no step left to take\n"
            )
        return None

    # The seed comes right before the model: first weights are a function of the seed alone.
    torch.manual_seed(config.train.seed)
    engine = build_engine(config, model=objective.build(), resume=state, world=world)
    if state is not None:
        _restore_cursor(loader, state, config)

    # Only now is the run folder written to: what failed before must leave an older run as it was.
    if world.is_main:
        keep_description(config.checkpoint_dir, dataset.info)
        _write_settings(config, run_dir, world_size=world.world_size)
    reporter = Reporter(
        run_dir,
        rank=world.rank,
        total_steps=total_steps,
        resumed_step=first_step,
        tensorboard=config.log.tensorboard,
    )
    if world.is_main:
        reporter.show_on(start_trackers(config, run_dir, warn=reporter.say))
    reporter.say(_opening_line(config, world, dataset, state, total_steps=total_steps))
    if world.world_size > 1 and config.engine.zero_stage == 3 and config.guard.checksum_every_steps:
        reporter.say(
            "weights are not compared between ranks: at engine.zero_stage 3 each rank keeps its "
            "own part"
        )
    return Run(
        config=config,
        objective=objective,
        world=world,
        outcome=outcome,
        run_dir=run_dir,
        loader=loader,
        held_out=held_out,
        engine=engine,
        store=store,
        saver=Saver(store, world=world, mode=config.checkpoint.mode),
        reporter=reporter,
        meter=Meter(global_batch_size=config.train.global_batch_size),
        skips=SkipGuard(
            skipped_in_a_row=config.guard.skipped_in_a_row, roll_backs=config.guard.roll_backs
        ),
        spikes=SpikeGuard(factor=config.guard.spike_factor),
        first_step=first_step,
        total_steps=total_steps,
        earlier_data_report=state.client.get("data_report") if state is not None else None,
        peak_tflops=_peak_tflops(config, world.device),
    )


def _restore_cursor(loader: Loader, state: CheckpointState, config: RunConfig) -> None:
    """Move the loader to the cursor that the checkpoint was saved with."""
    cursor = state.client["loader"]
    trained_on = kept_description(config.checkpoint_dir, cursor["fingerprint"])
    loader.load_state_dict(cursor, trained_on=trained_on, on_change=config.data.on_change)


def _peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    if config.engine.device_tflops:
        return config.engine.device_tflops
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _open_loader(
    config: RunConfig, objective: Objective, dataset: Manifest, *, world: World
) -> Loader:
    # Refused before the start already, unless the data had no index until now.
    refuse_lengths(config, num_samples=dataset.info.num_samples)
    return Loader(
        dataset,
        objective.sampling(),
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


def count_steps(config: RunConfig, *, steps_per_epoch: float) -> int:
    """Derive the run's number of optimizer steps from `train.steps` or `train.epochs`."""
    return total_steps_of(config, steps_per_epoch=steps_per_epoch)


def _open_together(uri: str, *, world: World) -> Manifest:
    """Open a dataset on rank 0 first: if it has to be scanned, it is scanned once, and the others
    read what rank 0 wrote."""
    dataset = open_dataset(uri) if world.is_main else None
    world.barrier()
    return dataset or open_dataset(uri)


def _opening_line(
    config: RunConfig,
    world: World,
    dataset: Manifest,
    state: CheckpointState | None,
    *,
    total_steps: int,
) -> str:
    ranks = f"{world.world_size} rank{'s' if world.world_size > 1 else ''} on {world.device.type}"
    data = f"{dataset.info.num_samples:,} images in {dataset.info.num_shards} shards"
    if state is None:
        return f"starting {config.run.name or config.recipe}: {total_steps} steps, {data}, {ranks}"
    seen = state.client.get("images_seen", 0)
    checkpoint = f"step {state.step} (images_seen {seen:,}) of {redact(state.uri)}"
    return f"resumed from {checkpoint}: to step {total_steps}, {ranks}"


def _write_settings(config: RunConfig, run_dir: Path, *, world_size: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
    if config.engine.kind == "deepspeed":
        write_json(
            run_dir / "ds_config.json", render_deepspeed_config(config, world_size=world_size)
        )
