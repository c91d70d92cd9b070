"""The ranks of a node: who is there, who is stopped, who is gone; and what dead ones have left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.errors import InfrastructureError
from tests.limits import HANG_S, wait_until
from train.process.roll import Roll, describe_stopped, is_consequence, name_cause
from train.process.watchdog import Watchdog

Sleeper = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the rolls of a test to itself."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Give a function that starts a process which waits."""
    started = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "3600"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(HANG_S)


def sign(folder: Path, roll: Roll, rank: int, pid: int, *, age_s: float = 0.0) -> None:
    """Put another process on a roll, as it would itself."""
    # The roll's folder is made when a rank signs.
    (where,) = folder.glob("maelstrom-*")
    started_s = psutil.Process(pid).create_time() - age_s
    entry = {"pid": pid, "started_s": started_s, "parent": pid}
    (where / f"rank-{rank}").write_text(json.dumps(entry))


def test_a_rank_runs_is_stopped_and_is_gone(folder: Path, sleeper: Sleeper) -> None:
    roll = Roll("a", rank=0, world_size=2)
    roll.sign()
    other = sleeper()
    sign(folder, roll, 1, other.pid)
    assert [entry.rank for entry in roll.others()] == [1]
    assert not roll.gone()
    assert not roll.stopped()

    os.kill(other.pid, signal.SIGSTOP)
    wait_until(roll.stopped, what="the stop")
    assert describe_stopped(roll).startswith(
        f" rank 1 (process {other.pid}) was stopped."
    )
    assert "was stopped" in str(name_cause(RuntimeError("gloo"), roll, rank=0))

    other.kill()
    # A zombie until its parent asks for it: that rank computes no more.
    wait_until(roll.gone, what="the end")
    assert not roll.stopped()
    assert "killed or crashed" in str(name_cause(RuntimeError("gloo"), roll, rank=0))
    roll.leave()
    assert list(folder.iterdir()) == []


def test_another_process_with_the_number_of_a_dead_rank_is_not_it(
    folder: Path, sleeper: Sleeper
) -> None:
    roll = Roll("a", rank=0, world_size=2)
    roll.sign()
    sign(folder, roll, 1, sleeper().pid, age_s=100.0)
    assert [entry.rank for entry in roll.gone()] == [1]


def test_only_errors_that_a_lost_rank_causes_are_taken_for_one() -> None:
    roll = Roll("a", rank=0, world_size=2)
    assert is_consequence(RuntimeError("[gloo] Connection closed by peer"), roll)
    assert not is_consequence(RuntimeError("shapes differ"), roll)
    assert not is_consequence(ValueError("gloo"), roll)
    assert not is_consequence(InfrastructureError("gloo"), roll)
    assert not is_consequence(RuntimeError("gloo"), Roll("a", rank=0, world_size=1))


def test_a_wait_for_a_save_is_no_progress_while_a_rank_is_stopped(
    folder: Path, sleeper: Sleeper
) -> None:
    roll = Roll("a", rank=0, world_size=2)
    roll.sign()
    other = sleeper()
    sign(folder, roll, 1, other.pid)
    watchdog = Watchdog(timeout_s=60.0, folder=folder, rank=0, roll=roll)
    for number, is_progress in ((signal.SIGSTOP, False), (signal.SIGCONT, True)):
        os.kill(other.pid, number)
        wait_until(lambda ok=is_progress: bool(roll.stopped()) != ok, what="the signal")
        watchdog._last_s = 0.0
        watchdog.beat_while_waiting()
        assert (watchdog._last_s > 0.0) == is_progress


# ------------------------------------------------------------------------ what dead ones left

LEAVES = """
import os, signal, sys, tempfile
sys.path.insert(0, {root!r})
tempfile.tempdir = {folder!r}
from train.process.roll import Roll
for rank in range(2):
    if os.fork() == 0:
        roll = Roll({launch!r}, rank=rank, world_size=2)
        roll.sign()
        roll.decide(76)
        os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
"""


def leave_behind(folder: Path, launch: str) -> Path:
    """Let all ranks of a start be killed, and its launcher end; give what they have left."""
    root = str(Path(__file__).resolve().parents[2])
    code = LEAVES.format(root=root, folder=str(folder), launch=launch)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_S)
    (left,) = folder.iterdir()
    assert {path.name for path in left.iterdir()} >= {
        "rank-0",
        "rank-1",
        "verdict.json",
    }
    return left


def test_a_start_clears_up_behind_one_whose_ranks_were_all_killed(
    folder: Path, sleeper: Sleeper
) -> None:
    left = leave_behind(folder, "killed")
    new = Roll("new", rank=0, world_size=2)

    # A launcher that lives may start more ranks, but not for ever.
    keeper = sleeper()
    for path in left.glob("rank-*"):
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "parent": keeper.pid})
        )
    new.sign()
    assert left.exists()
    long_ago_s = time.time() - 3600
    os.utime(left, (long_ago_s, long_ago_s))
    new.sign()
    assert not left.exists()


def test_a_dead_launcher_needs_no_patience_and_living_ranks_and_strangers_are_left_alone(
    folder: Path, sleeper: Sleeper
) -> None:
    left = leave_behind(folder, "killed")
    living = left.with_name(left.name + "1")
    living.mkdir()
    entry = {
        "pid": os.getpid(),
        "started_s": psutil.Process().create_time(),
        "parent": 1 << 30,
    }
    (living / "rank-0").write_text(json.dumps(entry))
    dead = json.loads((left / "rank-1").read_text())
    (living / "rank-1").write_text(json.dumps(dead))
    kept = folder / "kept"
    kept.mkdir()
    (kept / "rank-1").write_text(json.dumps(dead))
    link = left.with_name(left.name + "2")
    link.symlink_to(kept)

    Roll("new", rank=0, world_size=2).sign()
    assert not left.exists()
    assert sorted(path.name for path in living.iterdir()) == ["rank-0", "rank-1"]
    assert link.is_symlink()
    assert (kept / "rank-1").exists()


def test_a_start_of_the_same_name_takes_nothing_over(folder: Path) -> None:
    left = leave_behind(folder, "same")
    again = Roll("same", rank=0, world_size=2)

    # Just now: they may be ranks of this start, which died before this one came.
    again.sign()
    assert again.verdict() == 76
    assert [entry.rank for entry in again.gone()] == [1]

    earlier_s = psutil.Process().create_time() - 100
    dead = json.loads((left / "rank-1").read_text())
    (left / "rank-1").write_text(json.dumps({**dead, "started_s": earlier_s}))
    os.utime(left / "verdict.json", (earlier_s, earlier_s))
    again.sign()
    assert again.verdict() is None
    assert not again.gone()
