"""One job a run folder, also after crashes, reused process numbers and restarts of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from pipeline.errors import ConfigError
from tests.limits import wait_until
from train.process import lease as run_lease
from train.process.lease import (
    LEASE_FILE,
    FolderInUseError,
    Holder,
    RunLease,
    is_held_by_another,
)
from train.process.liveness import STALE_S, this_process


def host_here() -> str:
    here = this_process()
    return f"{here.host}#{here.boot_id}#{here.pid_namespace}"


def write_lease(folder: Path, **changes: object) -> None:
    mine = Holder(
        host_here(),
        os.getpid(),
        psutil.Process().create_time(),
        "other",
        "python -m train.pretrain",
    )
    (folder / LEASE_FILE).write_text(json.dumps({**asdict(mine), **changes}))


def test_second_job_is_refused_by_name_and_may_start_after_the_first(
    tmp_path: Path,
) -> None:
    with RunLease(tmp_path / "run"):
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()} on .* works here"),
            RunLease(tmp_path / "run"),
        ):
            pass
        assert (tmp_path / "run" / LEASE_FILE).exists()
    assert not (tmp_path / "run" / LEASE_FILE).exists()
    with RunLease(tmp_path / "run"):
        pass


def test_lease_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        started_s = psutil.Process(child.pid).create_time()
    write_lease(tmp_path, pid=child.pid, started_s=started_s)
    with RunLease(tmp_path):
        assert json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid()


def test_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    write_lease(tmp_path, started_s=psutil.Process().create_time() - 1000)
    with RunLease(tmp_path):
        pass


def test_lease_of_another_machine_holds_while_it_is_touched(tmp_path: Path) -> None:
    write_lease(tmp_path, host="elsewhere#boot#ns")
    with (
        pytest.raises(ConfigError, match="on elsewhere works here"),
        RunLease(tmp_path),
    ):
        pass
    old_s = time.time() - STALE_S - 5
    os.utime(tmp_path / LEASE_FILE, (old_s, old_s))
    with RunLease(tmp_path):
        pass


def test_lease_from_before_a_restart_of_this_machine_is_free(tmp_path: Path) -> None:
    name, _, namespace = host_here().split("#")
    write_lease(tmp_path, host=f"{name}#another-boot#{namespace}")
    with RunLease(tmp_path):
        pass


def test_unreadable_lease_is_free(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text("{")
    with RunLease(tmp_path):
        pass


def test_a_lease_that_another_took_over_is_not_removed(tmp_path: Path) -> None:
    with RunLease(tmp_path):
        write_lease(tmp_path, token="theirs")
    assert json.loads((tmp_path / LEASE_FILE).read_text())["token"] == "theirs"


def test_only_rank_0_holds_a_folder_and_only_it_is_refused(tmp_path: Path) -> None:
    with RunLease(tmp_path, rank=1):
        assert not (tmp_path / LEASE_FILE).exists()
    write_lease(tmp_path)
    with RunLease(tmp_path, rank=1):
        pass
    with pytest.raises(FolderInUseError), RunLease(tmp_path, rank=0):
        pass


LAUNCH = "node0:29500:77:1:4242"


@pytest.mark.parametrize(
    ("host", "theirs", "is_another"),
    [
        ("here", LAUNCH, False),
        ("here", "node0:29500:77:1:4243", True),
        ("here", "", True),
        # The launcher of another node is another process; the rest of the name is one run's.
        ("elsewhere#boot#ns", "node0:29500:77:1:9", False),
        ("elsewhere#boot#ns", "node0:29501:77:1:9", True),
        ("elsewhere#boot#ns", "5f3a", True),
    ],
)
def test_the_ranks_of_one_start_know_their_own_lease(
    host: str, theirs: str, is_another: bool, tmp_path: Path
) -> None:
    assert not is_held_by_another(tmp_path / "none", launch=LAUNCH)
    where = host_here() if host == "here" else host
    write_lease(tmp_path, host=where, token=f"5f3a@{theirs}")
    assert is_held_by_another(tmp_path, launch=LAUNCH) == is_another


def test_a_dead_holder_is_not_another_job(tmp_path: Path) -> None:
    write_lease(tmp_path, started_s=psutil.Process().create_time() - 1000)
    assert not is_held_by_another(tmp_path, launch=LAUNCH)


def test_the_holder_says_again_and_again_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lease, "BEAT_S", 0.01)
    beats: list[None] = []
    with RunLease(tmp_path, on_beat=lambda: beats.append(None)):
        os.utime(tmp_path / LEASE_FILE, (1.0, 1.0))
        wait_until(lambda: len(beats) >= 2, what="two beats")
        assert (tmp_path / LEASE_FILE).stat().st_mtime > 1.0
