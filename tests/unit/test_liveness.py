"""A status.json that says running is believed only if its process lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.limits import wait_until
from train.errors import NumericsError, Preempted
from train.process.lease import FolderInUseError, RunLease
from train.process.liveness import STALE_S, judge_status, this_process
from train.process.outcome import Outcome, read_status

ROOT = str(Path(__file__).resolve().parents[2])
RUNNING = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from train.process.outcome import Outcome
Outcome(Path({folder!r})).write("running", exit_code=None)
print("ready", flush=True)
sys.stdin.read()
"""


def running(folder: Path) -> dict[str, Any]:
    Outcome(folder).write("running", exit_code=None)
    return read_status(folder)


def test_a_living_process_is_running_however_old_its_word(tmp_path: Path) -> None:
    status = running(tmp_path)
    assert judge_status(status) == "running"
    assert judge_status(status, now_s=time.time() + 10 * STALE_S) == "running"


def test_a_killed_process_is_gone_at_once(tmp_path: Path) -> None:
    code = RUNNING.format(root=ROOT, folder=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        status = read_status(tmp_path)
        assert status["process"]["pid"] == child.pid
        assert judge_status(status) == "running"
        child.send_signal(signal.SIGKILL)
        # A zombie until it is waited for: it must not pass for running either.
        wait_until(lambda: judge_status(status) == "gone", what="the verdict gone")
    assert judge_status(status) == "gone"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "running"),
        ({"started_s": 1.0}, "gone"),  # its number was given again
        ({"boot_id": "before"}, "gone"),  # this machine was started again
        ({"host": "elsewhere"}, "running"),  # its word is fresh
        ({"pid_namespace": "another container"}, "running"),
        ({"host": None, "pid": "12"}, "running"),
    ],
)
def test_each_part_of_the_name_counts(
    changes: dict[str, Any], verdict: str, tmp_path: Path
) -> None:
    status = running(tmp_path)
    status["process"] |= changes
    assert judge_status(status) == verdict
    if verdict == "running" and changes:
        assert judge_status(status, now_s=time.time() + STALE_S + 10) == "gone"


def test_what_cannot_be_known_is_not_guessed() -> None:
    for status in (
        {},
        {"state": "running", "exit_code": None, "updated": "2026-01-01T00:00:00Z"},
        {"exit_code": None, "process": "me", "heartbeat": "2026-01-01T00:00:00Z"},
        {
            "exit_code": None,
            "process": this_process().to_json(),
            "heartbeat": "yesterday",
        },
    ):
        assert judge_status(status) == "unknown", status


def test_an_end_is_an_end(tmp_path: Path) -> None:
    for error in (Preempted("saved"), NumericsError("nan"), ValueError("x")):
        Outcome(tmp_path).conclude(error)
        assert judge_status(read_status(tmp_path)) == "ended"


# ------------------------------------------------------------------------------------ the heartbeat


def test_a_beat_sets_the_time_and_the_step_and_leaves_the_rest(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path)
    outcome.write("running", exit_code=None, total_steps=40)
    status = read_status(tmp_path)
    (tmp_path / "status.json").write_text(
        (tmp_path / "status.json")
        .read_text()
        .replace(status["heartbeat"], "2020-01-01T00:00:00Z")
    )
    outcome.step = 7
    outcome.beat()
    beaten = read_status(tmp_path)
    assert (beaten["step"], beaten["total_steps"]) == (7, 40)
    assert beaten["heartbeat"] >= status["heartbeat"]


def test_a_beat_does_not_revive_a_run_that_another_rank_has_ended(
    tmp_path: Path,
) -> None:
    outcome = Outcome(tmp_path)
    outcome.write("running", exit_code=None)
    outcome.conclude(NumericsError("nan"))
    ended = read_status(tmp_path)
    outcome.beat()
    assert read_status(tmp_path) == ended


def test_a_beat_never_raises(tmp_path: Path) -> None:
    Outcome(tmp_path / "none").beat()
    (tmp_path / "file").touch()
    Outcome(tmp_path / "file").beat()


# -------------------------------------------------------------------------- a start that is refused


def test_a_second_start_leaves_the_status_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Outcome(tmp_path)
    with RunLease(tmp_path, launch=first.launch):
        first.write("running", exit_code=None)
        before = read_status(tmp_path)
        second = Outcome(tmp_path)
        # Refused by the lease, or failed for whatever reason before it was asked.
        for error in (
            FolderInUseError("works here"),
            RuntimeError("port 29500 is in use"),
        ):
            second.conclude(error)
            assert read_status(tmp_path) == before
        assert "works here" in capsys.readouterr().err
        # Its own failures are told.
        first.conclude(NumericsError("nan"))
        assert read_status(tmp_path)["state"] == "failed"


def test_a_refused_start_leaves_the_status_even_if_the_first_has_ended_by_then(
    tmp_path: Path,
) -> None:
    first = Outcome(tmp_path)
    first.write("done", exit_code=0)
    Outcome(tmp_path).conclude(FolderInUseError("works here"))
    assert read_status(tmp_path)["state"] == "done"


def test_this_process_is_told_from_its_child() -> None:
    mine = this_process()
    assert mine.pid == os.getpid()
    assert mine.boot_id, "Linux says it"
