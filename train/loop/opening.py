"""Opening a run: data, model, engine, checkpoints and reports, brought to its newest
checkpoint."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset import Manifest, open_dataset
from pipeline.loader import Loader
from pipeline.storage import redact
from train.checkpoint.owner import CheckpointOwner
from train.checkpoint.saver import Saver
from train.checkpoint.state import CheckpointState
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import build_engine
from train.engine.deepspeed_config import render_deepspeed_config
from train.loop.guard import SkipGuard, SpikeGuard
from train.loop.progress import Pace, Progress
from train.loop.resuming import (
    Resume,
    check_same_run,
    describe_resume,
    progress_of,
    restore_cursor,
)
from train.objectives.base import Objective
from train.process.outcome import Outcome, write_json
from train.process.world import World
from train.report.data_record import keep_description
from train.report.earlier_run import SETTINGS_FILE, add_to_history, keep_earlier_run
from train.report.meter import Meter
from train.report.reporter import Reporter
from train.report.trackers import check_trackers, start_trackers, without_secrets
from train.report.utilisation import peak_tflops
from train.settings.lengths import refuse_lengths
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
    progress: Progress
    resume: Resume
    earlier_data_report: dict[str, Any] | None
    peak_tflops: float | None = None
    failed_saves: int = 0


def open_run(
    config: RunConfig,
    objective: Objective,
    *,
    world: World,
    outcome: Outcome,
    owner: CheckpointOwner,
) -> Run | None:
    """Open data, model, engine and reports at the newest checkpoint. All ranks enter.

    Args:
        config: checked settings.
        objective: what is learned.
        world: the processes of the run.
        outcome: told the step.
        owner: takes the folder of checkpoints for this job.

    Returns:
        The run; None if it is finished already.
    """
    check_trackers(config)
    run_dir = Path(config.run_dir)

    # Data first: the number of steps may depend on the size of the dataset.
    dataset = _open_together(config.data.train, world=world)
    held_out = _open_together(config.data.val, world=world) if config.data.val else None
    loader = _open_loader(config, objective, dataset, world=world)

    # The newest checkpoint, if there is one.
    found = _find_start(config, objective, loader, world=world, owner=owner)
    state = found.state
    first_step = state.step if state is not None else 0
    total_steps = found.progress.total_steps(config)
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

    reporter = _begin_reports(
        config, dataset, found, world=world, total_steps=total_steps
    )
    earlier = state.client.get("data_report") if state is not None else None
    return Run(
        config=config,
        objective=objective,
        world=world,
        outcome=outcome,
        run_dir=run_dir,
        loader=loader,
        held_out=held_out,
        engine=engine,
        store=found.store,
        saver=Saver(found.store, world=world, mode=config.checkpoint.mode),
        reporter=reporter,
        meter=Meter(global_batch_size=config.train.global_batch_size),
        skips=SkipGuard(
            skipped_in_a_row=config.guard.skipped_in_a_row,
            roll_backs=config.guard.roll_backs,
        ),
        spikes=SpikeGuard(factor=config.guard.spike_factor),
        first_step=first_step,
        total_steps=total_steps,
        progress=found.progress,
        resume=found.resume,
        earlier_data_report=earlier,
        peak_tflops=_peak_tflops(config, world.device),
    )


@dataclass(frozen=True)
class _Found:
    """What a start found in the folder of checkpoints.

    Args:
        store: the folder.
        state: the newest checkpoint; None if there is none.
        resume: how this start differs from the one that saved it.
        progress: how far the run is.
    """

    store: CheckpointStore
    state: CheckpointState | None
    resume: Resume
    progress: Progress


def _find_start(
    config: RunConfig,
    objective: Objective,
    loader: Loader,
    *,
    world: World,
    owner: CheckpointOwner,
) -> _Found:
    """Take the folder of checkpoints, find the newest one, and bring the loader to it."""
    # The folder is taken first: what another job is still writing there must not be read as the
    # state of this run.
    owner.take()
    store = CheckpointStore(
        config.checkpoint_dir,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        owner=owner,
    )
    state = store.latest(world)
    resume = Resume(run_id=world.broadcast(uuid.uuid4().hex[:12]))
    if state is not None:
        # Also before a run is called finished: another one may have left these checkpoints.
        resume = check_same_run(config, objective, state)
        restore_cursor(loader, state, config)
    pace = Pace(config.train.global_batch_size, loader.steps_per_epoch)
    return _Found(store, state, resume, progress_of(state, pace))


def _begin_reports(
    config: RunConfig,
    dataset: Manifest,
    found: _Found,
    *,
    world: World,
    total_steps: int,
) -> Reporter:
    """Keep the settings in the run folder, open its reports and say what begins."""
    run_dir = Path(config.run_dir)
    first_step = found.state.step if found.state is not None else 0

    # Only now is the run folder written to: what failed before must leave an older run as it was.
    kept_files: list[str] = []
    if world.is_main:
        keep_description(config.checkpoint_dir, dataset.info)
        kept_files = _write_settings(
            config, run_dir, found.resume, step=first_step, world=world
        )
    reporter = Reporter(
        run_dir,
        rank=world.rank,
        total_steps=total_steps,
        resumed_step=first_step,
        tensorboard=config.log.tensorboard,
    )
    if world.is_main:
        reporter.show_on(start_trackers(config, run_dir, warn=reporter.say))
    for line in _opening_lines(config, world, dataset, found):
        reporter.say(line)
    if kept_files:
        reporter.say(
            f"{run_dir} has files of an earlier run, kept as {', '.join(kept_files)}"
        )
    return reporter


def _peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    if config.engine.device_tflops:
        return config.engine.device_tflops
    return (
        peak_tflops(torch.cuda.get_device_name(device))
        if device.type == "cuda"
        else None
    )


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


def _open_together(uri: str, *, world: World) -> Manifest:
    """Open a dataset on rank 0 first: if it has to be scanned, it is scanned once, and the others
    read what rank 0 wrote."""
    dataset = open_dataset(uri) if world.is_main else None
    world.barrier()
    return dataset or open_dataset(uri)


def _opening_lines(
    config: RunConfig, world: World, dataset: Manifest, found: _Found
) -> list[str]:
    """Say what begins here, or goes on and how it differs from before."""
    total_steps = found.progress.total_steps(config)
    ranks = f"{world.world_size} rank{'s' if world.world_size > 1 else ''} on {world.device.type}"
    data = f"{dataset.info.num_samples:,} images in {dataset.info.num_shards} shards"
    name = config.run.name or config.recipe
    lines = [f"starting {name}: {total_steps} steps, {data}, {ranks}"]
    state = found.state
    if state is not None:
        seen = found.progress.images_at(state.step)
        where = f"step {state.step} (images_seen {seen:,}) of {redact(state.uri)}"
        lines = [f"resumed from {where}: to step {total_steps}, {ranks}"]
        lines += describe_resume(
            config,
            state,
            found.resume,
            found.progress,
            ranks=world.world_size,
        )
    if (
        world.world_size > 1
        and config.engine.zero_stage == 3
        and config.guard.checksum_every_steps
    ):
        lines.append(
            "weights are not compared between ranks: at engine.zero_stage 3 each rank keeps its "
            "own part"
        )
    return lines


def _write_settings(
    config: RunConfig, run_dir: Path, resume: Resume, *, step: int, world: World
) -> list[str]:
    """Write the settings of this start, and keep what another run has left here.

    Returns:
        New names of another run's files.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    # Before anything is written here under the old names.
    settings = to_toml(config)
    kept_files = keep_earlier_run(
        run_dir,
        run_id=resume.run_id,
        step=step,
        settings=settings,
        checkpoint_dir=config.checkpoint.dir,
    )
    add_to_history(
        run_dir,
        {
            "run": resume.run_id,
            "from_step": step,
            "checkpoint_dir": config.checkpoint.dir,
            "ranks": world.world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "command": redact(" ".join(sys.argv)),
            "changed": [asdict(change) for change in resume.changes],
            "accepted": resume.accepted,
            "kept_files": kept_files,
            "settings": without_secrets(config.model_dump(mode="json")),
        },
    )
    # Of the latest start; history.jsonl has those of all.
    (run_dir / SETTINGS_FILE).write_text(settings, encoding="utf-8")
    if config.engine.kind == "deepspeed":
        write_json(
            run_dir / "ds_config.json",
            render_deepspeed_config(config, world_size=world.world_size),
        )
    return kept_files
