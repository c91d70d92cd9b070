"""Ranks that wait for each other: who died or was stopped meanwhile is named, not waited for."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.errors import InfrastructureError
from tests.launch import find_free_port
from tests.limits import HANG_S, wait_until
from train.process.meeting import meet
from train.process.place import RankPlace
from train.process.roll import Roll

SHORT_S = 0.3


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    process = subprocess.Popen(["sleep", "3600"])
    yield process
    process.kill()
    process.wait(HANG_S)


def place_of(rank: int) -> RankPlace:
    return RankPlace(
        rank=rank,
        local_rank=rank,
        world_size=2,
        local_world_size=2,
        master_addr="127.0.0.1",
        master_port=find_free_port(),
    )


@pytest.fixture(params=[0, 1])
def rolled(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: subprocess.Popen[bytes],
) -> tuple[int, Roll]:
    """Give each of two ranks, which waits, with a roll that has the other one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    rank = int(request.param)
    roll = Roll("a", rank=rank, world_size=2)
    roll.sign()
    (folder,) = tmp_path.glob("maelstrom-*")
    started_s = psutil.Process(other.pid).create_time()
    entry = {"pid": other.pid, "started_s": started_s, "parent": os.getpid()}
    (folder / f"rank-{1 - rank}").write_text(json.dumps(entry))
    return rank, roll


def test_a_rank_that_died_is_not_waited_for(
    rolled: tuple[int, Roll], other: subprocess.Popen[bytes]
) -> None:
    rank, roll = rolled
    other.kill()
    wait_until(roll.gone, what="the end")
    says = rf"rank {1 - rank} \(process {other.pid}\) was killed or crashed"
    with pytest.raises(InfrastructureError, match=says):
        meet(place_of(rank), timeout_s=HANG_S, roll=roll)


def test_a_rank_that_was_stopped_is_named_when_the_time_is_over(
    rolled: tuple[int, Roll], other: subprocess.Popen[bytes]
) -> None:
    rank, roll = rolled
    os.kill(other.pid, signal.SIGSTOP)
    wait_until(roll.stopped, what="the stop")
    says = rf"engine.timeout_s.*rank {1 - rank} \(process {other.pid}\) was stopped"
    with pytest.raises(InfrastructureError, match=says):
        meet(place_of(rank), timeout_s=SHORT_S, roll=roll)


def test_a_program_that_listens_and_never_answers_is_not_waited_for_in_c() -> None:
    """torch's own timeout does not end this wait."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        place = dataclasses.replace(place_of(1), master_port=mute.getsockname()[1])
        with pytest.raises(InfrastructureError, match="no other program"):
            meet(place, timeout_s=SHORT_S)
