"""The training loop: accumulate, step, judge, log, save, draw, stop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.loader import Batch
from train.checkpoint.owner import CheckpointOwner
from train.config import RunConfig
from train.errors import Preempted
from train.loop.guard import Reaction
from train.loop.opening import Run, open_run
from train.loop.recovery import SeenBatch, record_skipped, roll_back
from train.loop.replicas import check_replicas
from train.loop.reporting import MeanLoss, conclude, draw_pictures, log_line
from train.loop.resuming import rate_at
from train.loop.saving import begin_save, finish_save
from train.objectives.base import Objective
from train.objectives.choose import choose_objective
from train.process.lease import RunLease
from train.process.outcome import Outcome
from train.process.preemption import Preemption
from train.process.watchdog import Watchdog
from train.process.world import init_world
from train.report.data_record import leave_data_report


def train(
    config: RunConfig, outcome: Outcome, objective: Objective | None = None
) -> None:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        config: checked settings.
        outcome: told the step as it advances.
        objective: what is learned; by default what the settings ask for.

    Raises:
        MaelstromError: whatever ends a run early; see `train.errors`.
    """
    objective = objective or choose_objective(config)
    run_dir = Path(config.run_dir)
    # Before the processes meet: a second start of this run ends here, and not because its port is
    # taken, which would look like a failure of the first.
    lease = RunLease(
        run_dir, rank=outcome.rank, launch=outcome.launch, on_beat=outcome.beat
    )
    with lease:
        if outcome.rank == 0:
            outcome.write("running", exit_code=None)
        world = init_world(config, roll=outcome.roll)
        owner = CheckpointOwner(config.checkpoint_dir, run_dir=run_dir, world=world)
        with Preemption(world) as preemption, owner:
            outcome.began = True
            run = open_run(config, objective, world=world, outcome=outcome, owner=owner)
            if run is not None:
                try:
                    with Watchdog(
                        timeout_s=config.engine.timeout_s,
                        folder=run_dir,
                        rank=world.rank,
                        roll=outcome.roll,
                        conclude=outcome.conclude,
                    ) as watchdog:
                        _loop(run, preemption, watchdog)
                except DataError:
                    leave_data_report(
                        run.loader.report, run_dir=run_dir, rank=world.rank
                    )
                    raise
                finally:
                    run.reporter.close()
                    run.loader.close()
            preemption.disarm()
        world.end()


def _loop(run: Run, preemption: Preemption, watchdog: Watchdog) -> None:
    """Take the steps.

    Every rank runs the same lines in the same order, because most blocks hold a collective: a
    condition may only use what is equal on all ranks. A value is read back from the device only if
    a line of the log is due, so that the host can queue the next step while the device works.
    """
    config = run.config
    batches = iter(run.loader)
    mean_loss = MeanLoss(run.engine.device)
    # A save may take longer than a step is allowed to.
    run.saver.on_wait = watchdog.beat_while_waiting

    done = run.first_step
    while done < run.total_steps:
        # Accumulate the gradients of one global batch.
        micro_batches = _accumulate(run, batches)

        # Step. A skipped one counts too: the schedule follows the data, not the updates.
        lr = rate_at(done, config=config, progress=run.progress)
        skipped_before = run.engine.skipped_steps
        run.engine.step(lr)
        was_taken = run.engine.skipped_steps == skipped_before
        done += 1
        run.outcome.step = done
        run.meter.step()
        run.reporter.advance(done)

        # Judge the numbers. The loss of a skipped step is left out of the mean: it may be NaN.
        if was_taken:
            mean_loss.add([seen.loss for seen in micro_batches])
        reaction = _judge(run, done, micro_batches, was_taken=was_taken)
        if reaction in ("roll-back", "stop"):
            done = roll_back(run, done, reaction=reaction)
            mean_loss.clear()
            watchdog.beat()
            continue

        # Asked once per step: whether to stop is agreed between the ranks.
        is_last = done == run.total_steps
        is_stopping = preemption.requested()

        # Log; also before every end, so that no step is missing from the metrics.
        is_spike = False
        if is_last or is_stopping or _is_due(done, config.log.every_steps):
            is_spike = log_line(run, done, lr=lr, mean_loss=mean_loss)

        # Compare the weights of the ranks before they may be saved. At ZeRO 3 no rank has them all.
        if (
            _is_due(done, config.guard.checksum_every_steps)
            and config.engine.zero_stage < 3
        ):
            check_replicas(run.engine.module, world=run.world, step=done)

        # Save. While steps are being skipped the weights are under suspicion, and no scheduled
        # checkpoint of them may push out a good one.
        is_save_due = (
            _is_due(done, config.checkpoint.every_steps) and not run.skips.in_a_row
        )
        if is_last or is_stopping or is_spike or is_save_due:
            begin_save(run, done, wait=is_last or is_stopping)
        elif run.saver.is_ready():
            finish_save(run)

        # Draw after saving: a picture that fails must not cost the steps before it.
        if is_last or _is_due(done, config.log.pictures_every_steps):
            draw_pictures(run, done)

        # Stop. After the last step the run ends by itself.
        if is_stopping and not is_last:
            preemption.disarm()
            raise Preempted(_stop_message(run, preemption.reason))
        watchdog.beat()
    conclude(run)


def _accumulate(run: Run, batches: Iterator[Batch]) -> list[SeenBatch]:
    """Run forward and backward passes over this rank's part of one global batch."""
    micro_batches = []
    for _ in range(run.engine.grad_accum_steps):
        batch = next(batches)
        inputs = run.objective.inputs(batch)
        loss = run.engine.forward_backward(*inputs)
        # Only names and loss are kept: the images' memory is free before the next micro-batch.
        micro_batches.append(
            SeenBatch(
                batch.sample_ids_B, batch.epochs_B, batch.epoch, batch.position, loss
            )
        )
    return micro_batches


def _judge(
    run: Run, done: int, micro_batches: list[SeenBatch], *, was_taken: bool
) -> Reaction:
    """Decide what follows from a step's numbers, and record the images of one that was skipped."""
    # A loss scaler on its way down skips steps by design; the images are not to blame.
    is_sound = was_taken or run.engine.searches_loss_scale
    if not is_sound:
        record_skipped(run, done, micro_batches)
    return run.skips.judge("taken" if is_sound else "skipped")


def _is_due(done: int, every: int) -> bool:
    """Tell whether a multiple of `every` steps is done; never if it is 0."""
    return every > 0 and done % every == 0


def _stop_message(run: Run, reason: str) -> str:
    reasons = [text for text in run.world.gather(reason) if text]
    return (
        f"stopped ({reasons[0] if reasons else 'asked to'}) and saved at step {run.outcome.step} "
        f"of {run.total_steps}: the same command line goes on from there"
    )
