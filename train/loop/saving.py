"""Begin and finish saves."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.storage import redact
from train.checkpoint.store import CheckpointWriteError
from train.loop.opening import Run
from train.report.data_record import collect_data_report

SAVE_FAILURES_ALLOWED = 3
"""Saves in a row that may fail before the run stops: a full disk may be emptied, a lost one will
not come back."""


# ---------------------------------------------------------------------------------- saving, drawing
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
    """Take in a save's outcome; a failure is a warning until it repeats: the last good checkpoint
    is still there."""
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
        run.failed_saves = 0
        run.reporter.say(
            f"saved step {saved.step} to {redact(saved.uri)} (training waited {saved.stall_s:.2f} "
            "s)"
        )


def _data_report(run: Run) -> dict[str, Any]:
    return collect_data_report(
        run.loader.report, run_dir=run.run_dir, world=run.world, earlier=run.earlier_data_report
    )
