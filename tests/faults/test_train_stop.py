"""Every way a run is told to stop reaches all ranks at one step, under every launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.train_runs import command_of, environment, find_free_port, losses
from tests.faults.train_runs import start as train
from train.process.outcome import read_status

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).with_name("train_stop_worker.py"))
LIMIT_S = 120.0
PLAIN = [sys.executable, WORKER]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    WORKER,
]
DEEPSPEED = [
    str(Path(sys.executable).with_name("deepspeed")),
    "--num_accelerators=2",
    "--master_port={port}",
    WORKER,
]

Start = Callable[..., subprocess.Popen[bytes]]


def wait_for(paths: list[Path]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline_s, (
            f"still missing: {[str(path) for path in paths if not path.exists()]}"
        )
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def launch(command: list[str], *, ranks: int) -> subprocess.Popen[bytes]:
        command = [part.format(port=find_free_port()) for part in command]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        process = subprocess.Popen([*command, str(tmp_path)], env=env, start_new_session=True)
        started.append(process)
        wait_for([tmp_path / f"ready-{rank}" for rank in range(ranks)])
        return process

    yield launch
    for process in started:
        pids = [int(path.read_text()) for path in tmp_path.glob("ready-*")]
        for pid in [process.pid, *pids]:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def read_stopped(folder: Path, *, ranks: int) -> list[dict[str, object]]:
    wait_for([folder / f"stopped-{rank}" for rank in range(ranks)])
    return [json.loads((folder / f"stopped-{rank}").read_text()) for rank in range(ranks)]


def check_ranks_ended(folder: Path, *, ranks: int) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    for rank in range(ranks):
        pid = int((folder / f"ready-{rank}").read_text())
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline_s, f"rank {rank} is still there"
            time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_plain_python_stops_and_says_preempted(
    tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    process = start(PLAIN, ranks=1)
    process.send_signal(number)
    assert process.wait(LIMIT_S) == 75
    assert read_stopped(tmp_path, ranks=1)[0]["reason"] == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_told_to_end_lets_both_ranks_stop_at_one_step(
    tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    process = start(TORCHRUN, ranks=2)
    process.send_signal(number)
    stopped = read_stopped(tmp_path, ranks=2)
    assert stopped[0]["step"] == stopped[1]["step"]
    process.wait(LIMIT_S)
    check_ranks_ended(tmp_path, ranks=2)


def test_a_signal_to_one_rank_stops_both(tmp_path: Path, start: Start) -> None:
    process = start(TORCHRUN, ranks=2)
    os.kill(int((tmp_path / "ready-1").read_text()), signal.SIGTERM)
    stopped = read_stopped(tmp_path, ranks=2)
    assert stopped[0]["step"] == stopped[1]["step"]
    assert {str(rank["reason"]) for rank in stopped} == {"", "SIGTERM"}
    process.wait(LIMIT_S)


def test_torchrun_killed_does_not_leave_ranks_behind(tmp_path: Path, start: Start) -> None:
    process = start(TORCHRUN, ranks=2)
    process.kill()
    process.wait(LIMIT_S)
    assert any(
        "launcher is gone" in str(rank["reason"]) for rank in read_stopped(tmp_path, ranks=2)
    )
    check_ranks_ended(tmp_path, ranks=2)


def test_deepspeed_command_told_to_end_does_not_leave_ranks_behind(
    tmp_path: Path, start: Start
) -> None:
    process = start(DEEPSPEED, ranks=2)
    process.terminate()
    process.wait(LIMIT_S)
    stopped = read_stopped(tmp_path, ranks=2)
    assert stopped[0]["step"] == stopped[1]["step"]
    assert any("launcher is gone (deepspeed)" in str(rank["reason"]) for rank in stopped)
    check_ranks_ended(tmp_path, ranks=2)


def test_ctrl_c_on_the_deepspeed_command_stops_both_ranks_in_order(
    tmp_path: Path, start: Start
) -> None:
    process = start(DEEPSPEED, ranks=2)
    os.killpg(
        process.pid, signal.SIGINT
    )  # what a terminal does: launcher, its child and both ranks at once
    stopped = read_stopped(tmp_path, ranks=2)
    assert stopped[0]["step"] == stopped[1]["step"]
    process.wait(LIMIT_S)
    check_ranks_ended(tmp_path, ranks=2)


def test_a_rank_that_hangs_ends_the_run_with_stacks_and_the_run_goes_on(
    make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    data, run_dir = make_dataset(), tmp_path / "run"
    settings = {"train.steps": "4000", "checkpoint.every-steps": "1", "engine.timeout-s": "5"}
    command = command_of(
        tmp_path, {}, data=data, settings={**settings, "checkpoint.keep-last": "2"}
    )
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for([run_dir / "checkpoints" / "step-000003" / "MANIFEST.json"])
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if not child.children()
    ]
    ranks = [child for child in ranks if "train_run_worker.py" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[0].suspend()
    stacks = [run_dir / f"stacks-rank-0000{rank}.txt" for rank in (0, 1)]
    deadline_s = time.monotonic() + LIMIT_S
    while not any(path.exists() for path in stacks):
        assert time.monotonic() < deadline_s, "nobody noticed"
        time.sleep(0.05)
    ranks[0].resume()  # so that torchrun, which asks it to end first, need not wait
    assert process.wait(LIMIT_S) != 0
    psutil.wait_procs(ranks, timeout=LIMIT_S)
    text = next(path for path in stacks if path.exists()).read_text()
    assert "more than engine.timeout_s 5" in text
    assert "train/loop/loop.py" in text
    done = read_status(run_dir)["step"]
    again = train(tmp_path, {}, data=data, settings={**settings, "train.steps": str(done + 2)})
    assert again.returncode == 0, again.stderr
    assert "resumed from step" in again.stdout
    assert list(losses(run_dir)) == list(range(1, done + 3))
