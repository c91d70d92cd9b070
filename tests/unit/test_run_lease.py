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
from train.process import lease as run_lease
from train.process.lease import LEASE_FILE, STALE_S, Holder, RunLease
from train.process.world import World


def write_lease(folder: Path, **changes: object) -> None:
    mine = Holder(
        run_lease._host(),
        os.getpid(),
        psutil.Process().create_time(),
        "other",
        "python -m train.pretrain",
    )
    (folder / LEASE_FILE).write_text(json.dumps({**asdict(mine), **changes}))


def test_second_job_is_refused_by_name_and_may_start_after_the_first(tmp_path: Path) -> None:
    with RunLease(tmp_path / "run", world=World()):
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()} on .* works here"),
            RunLease(tmp_path / "run", world=World()),
        ):
            pass
        assert (tmp_path / "run" / LEASE_FILE).exists()
    assert not (tmp_path / "run" / LEASE_FILE).exists()
    with RunLease(tmp_path / "run", world=World()):
        pass


def test_lease_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        started_s = psutil.Process(child.pid).create_time()
    write_lease(tmp_path, pid=child.pid, started_s=started_s)
    with RunLease(tmp_path, world=World()):
        assert json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid()


def test_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    write_lease(tmp_path, started_s=psutil.Process().create_time() - 1000)
    with RunLease(tmp_path, world=World()):
        pass


def test_lease_of_another_machine_holds_while_it_is_touched(tmp_path: Path) -> None:
    write_lease(tmp_path, host="elsewhere#boot#ns")
    with (
        pytest.raises(ConfigError, match="on elsewhere works here"),
        RunLease(tmp_path, world=World()),
    ):
        pass
    old_s = time.time() - STALE_S - 5
    os.utime(tmp_path / LEASE_FILE, (old_s, old_s))
    with RunLease(tmp_path, world=World()):
        pass


def test_lease_from_before_a_restart_of_this_machine_is_free(tmp_path: Path) -> None:
    name, _, namespace = run_lease._host().split("#")
    write_lease(tmp_path, host=f"{name}#another-boot#{namespace}")
    with RunLease(tmp_path, world=World()):
        pass


def test_unreadable_lease_is_free(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text("{")
    with RunLease(tmp_path, world=World()):
        pass


def test_a_lease_that_another_took_over_is_not_removed(tmp_path: Path) -> None:
    with RunLease(tmp_path, world=World()):
        write_lease(tmp_path, token="theirs")
    assert json.loads((tmp_path / LEASE_FILE).read_text())["token"] == "theirs"
