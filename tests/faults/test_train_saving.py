"""Saves that fail: a warning, the last good checkpoint stays, the next save goes through; three in
a row end the run.

OUTAGE_S=30 in the environment takes the store away for longer than the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.train_runs import losses, start
from train.checkpoint.files import find_steps
from train.process.outcome import read_status
from train.report.metrics_file import read_metrics

pytestmark = pytest.mark.slow

SETTINGS = {"train.steps": "20", "checkpoint.every-steps": "4"}
OUTAGE_S = float(os.environ.get("OUTAGE_S", "4"))


def block(run_dir: Path, *steps: int) -> list[Path]:
    """Put files where the folders of these steps' checkpoints should be."""
    files = [run_dir / "checkpoints" / f"step-{step:06d}" for step in steps]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("in the way")
    return files


def test_saves_that_fail_are_told_and_end_the_run_at_the_third_in_a_row(
    make_dataset: Callable[..., str], tmp_path: Path
):
    data, run_dir = make_dataset(), tmp_path / "run"
    files = block(run_dir, 8, 12, 16)
    failed = start(tmp_path, {}, data=data, ranks=1, settings=SETTINGS)
    status = read_status(run_dir)
    assert (failed.returncode, status["state"], status["exit_code"]) == (
        76,
        "failed",
        76,
    ), failed.stderr
    assert failed.stdout.count("training goes on") == 2
    assert failed.stderr.count("error: ") == 1
    assert "step-000016: the checkpoint was not saved" in failed.stderr
    assert list(find_steps(str(run_dir / "checkpoints"))) == [4]

    files[-1].unlink()  # two failures, then one that goes through
    done = start(tmp_path, {}, data=data, ranks=1, settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "resumed from step 4 " in done.stdout
    assert done.stdout.count("training goes on") == 2
    assert list(find_steps(str(run_dir / "checkpoints"))) == [4, 16, 20]
    assert list(losses(run_dir)) == list(range(1, 21))


@pytest.mark.remote
def test_a_store_that_is_away_for_a_while_loses_nothing(
    make_dataset: Callable[..., str], s3_bucket: str, through_proxy, tmp_path: Path
):
    data, checkpoints = make_dataset(), f"{s3_bucket}/checkpoints"
    proxy = through_proxy()
    proxy.plan_outage(OUTAGE_S, match="step-000008")
    done = start(
        tmp_path,
        {},
        data=data,
        ranks=1,
        settings={**SETTINGS, "checkpoint.dir": checkpoints},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert proxy.done["outage"] >= 2
    assert "training goes on" not in done.stdout, "a save was given up"
    assert list(find_steps(checkpoints)) == [4, 8, 12, 16, 20]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(
        range(1, 21)
    )
