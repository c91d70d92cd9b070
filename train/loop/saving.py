"""Begin and finish saves, with what the loop has to know to go on."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.storage import redact
from train.checkpoint.store import CheckpointWriteError
from train.loop.opening import Run
from train.loop.progress import PROGRESS_KEY
from train.report.data_record import collect_data_report

SAVE_FAILURES_ALLOWED = 3
"""Saves in a row that may fail before the run stops: a full disk may be emptied, a lost one will
not come back."""


def begin_save(run: Run, done: int, *, wait: bool) -> None:
    """Begin a save, after the one before is done. All ranks enter.

    Args:
        run: the run.
        done: optimizer steps done.
        wait: for the save's end, because the run ends here; its failure is then raised.
    """
    if run.saver.pending is not None:
        finish_save(run)
    # What the saving costs is told by itself, and is left out of the rates of the log.
    run.meter.pause()
    # The loader's state is the cursor behind this step's last batch, not behind what its threads
    # have read ahead.
    client = {
        "step": done,
        "images_seen": run.progress.images_at(done),
        "total_steps": run.total_steps,
        PROGRESS_KEY: run.progress.to_json(),
        **run.resume.to_client(step=run.first_step),
        "loader": run.loader.state_dict(),
        "data_report": merge_data_reports(run),
    }
    run.saver.start(done, run.engine, client)
    if wait or run.config.checkpoint.mode == "sync":
        finish_save(run, failure="raise" if wait else "warn")
    run.meter.go_on()


def finish_save(run: Run, *, failure: Literal["warn", "raise"] = "warn") -> None:
    """Take in a save's outcome; waits for it if it is still under way. All ranks enter.

    Args:
        run: the run.
        failure: `warn` until a failure repeats, for the last good checkpoint is still there; or
            `raise` at once.

    Raises:
        CheckpointWriteError: too many saves in a row failed, or the first one with `raise`.
    """
    try:
        saved = run.saver.finish()
    except CheckpointWriteError as error:
        run.failed_saves += 1
        if run.failed_saves >= SAVE_FAILURES_ALLOWED or failure == "raise":
            raise
        run.reporter.say(
            f"warning: {error}; training goes on ({run.failed_saves} of {SAVE_FAILURES_ALLOWED} "
            "allowed)"
        )
        return
    if saved is not None:
        # Failures count in a row: a disk that has room again is as good as new.
        run.failed_saves = 0
        run.reporter.say(
            f"saved step {saved.step} to {redact(saved.uri)} (training waited {saved.stall_s:.2f} "
            "s)"
        )


def merge_data_reports(run: Run) -> dict[str, Any]:
    """Add up what was bad on all ranks and before the last resume. All ranks enter."""
    return collect_data_report(
        run.loader.report,
        run_dir=run.run_dir,
        world=run.world,
        earlier=run.earlier_data_report,
    )
