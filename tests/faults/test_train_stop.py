"""Every way a run is told to stop reaches all ranks at one step, under every launcher."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.faults.train_runs import losses, words_of
from tests.faults.train_runs import start as train
from tests.launch import SERVER, Started, find_free_port
from tests.launch import start as start_ranks
from tests.limits import HANG_S, wait_until
from train.checkpoint.files import find_steps
from train.process.outcome import read_status

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).with_name("train_stop_worker.py"))
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


def wait_for(
    paths: Sequence[Path], *, process: subprocess.Popen[bytes] | None = None
) -> None:
    wait_until(
        lambda: all(path.exists() for path in paths),
        what=f"files {[path.name for path in paths]}",
        still_possible=lambda: process is None or process.poll() is None,
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def launch(command: list[str], *, ranks: int) -> subprocess.Popen[bytes]:
        command = [part.format(port=find_free_port()) for part in command]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        process = subprocess.Popen(
            [*command, str(tmp_path)], env=env, start_new_session=True
        )
        started.append(process)
        wait_for([tmp_path / f"ready-{rank}" for rank in range(ranks)], process=process)
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
    return [
        json.loads((folder / f"stopped-{rank}").read_text()) for rank in range(ranks)
    ]


def check_ranks_ended(folder: Path, *, ranks: int) -> None:
    for rank in range(ranks):
        pid = int((folder / f"ready-{rank}").read_text())
        wait_until(lambda pid=pid: has_ended(pid), what=f"the end of rank {rank}")


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
)
def test_plain_python_stops_and_says_preempted(
    tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    process = start(PLAIN, ranks=1)
    process.send_signal(number)
    assert process.wait(HANG_S) == 75
    assert read_stopped(tmp_path, ranks=1)[0]["reason"] == number.name


@pytest.mark.parametrize(
    ("before", "number"),
    [
        ([], signal.SIGTERM),
        ([], signal.SIGINT),
        ([], signal.SIGHUP),
        # torchrun sets its own handler, so that a terminal which goes away stops the run after all.
        (["nohup"], signal.SIGHUP),
    ],
)
def test_torchrun_told_to_end_lets_both_ranks_stop_at_one_step(
    tmp_path: Path, start: Start, before: list[str], number: signal.Signals
) -> None:
    process = start([*before, *TORCHRUN], ranks=2)
    process.send_signal(number)
    stopped = read_stopped(tmp_path, ranks=2)
    assert stopped[0]["step"] == stopped[1]["step"]
    process.wait(HANG_S)
    check_ranks_ended(tmp_path, ranks=2)


def test_a_signal_to_one_rank_stops_both(tmp_path: Path, start: Start) -> None:
    process = start(TORCHRUN, ranks=2)
    os.kill(int((tmp_path / "ready-1").read_text()), signal.SIGTERM)
    stopped = read_stopped(tmp_path, ranks=2)
    assert stopped[0]["step"] == stopped[1]["step"]
    assert {str(rank["reason"]) for rank in stopped} == {"", "SIGTERM"}
    process.wait(HANG_S)


def test_torchrun_killed_does_not_leave_ranks_behind(
    tmp_path: Path, start: Start
) -> None:
    process = start(TORCHRUN, ranks=2)
    process.kill()
    process.wait(HANG_S)
    assert any(
        "launcher is gone" in str(rank["reason"])
        for rank in read_stopped(tmp_path, ranks=2)
    )
    check_ranks_ended(tmp_path, ranks=2)


def test_deepspeed_command_told_to_end_does_not_leave_ranks_behind(
    tmp_path: Path, start: Start
) -> None:
    process = start(DEEPSPEED, ranks=2)
    process.terminate()
    process.wait(HANG_S)
    stopped = read_stopped(tmp_path, ranks=2)
    assert stopped[0]["step"] == stopped[1]["step"]
    assert any(
        "launcher is gone (deepspeed)" in str(rank["reason"]) for rank in stopped
    )
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
    process.wait(HANG_S)
    check_ranks_ended(tmp_path, ranks=2)


def test_a_rank_that_hangs_ends_the_run_with_stacks_and_the_run_goes_on(
    make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    """Rank 0 hangs after step 6, two steps after a save; rank 1 waits for it in a collective."""
    data, run_dir = make_dataset(), tmp_path / "run"
    settings = {
        "checkpoint.every-steps": "4",
        "train.steps": "4",
        "optim.warmup-steps": "1",
    }
    SERVER.start()
    begun_s = time.monotonic()
    first = train(tmp_path, {}, data=data, settings=settings)
    assert first.returncode == 0, first.stderr
    # A whole run took so long on this machine as it is now: a step, or one rank's start, will not.
    timeout_s = math.ceil(5 + 2 * (time.monotonic() - begun_s))
    settings |= {"train.steps": "4000", "engine.timeout-s": str(timeout_s)}
    plan = {"hang": {"rank": 0, "step": 6}}
    with start_ranks(
        words_of(tmp_path, plan, data=data, settings=settings), ranks=2
    ) as hanging:
        stacks = run_dir / "stacks-rank-00001.txt"
        wait_until(
            lambda: hanging.is_running() and hanging.codes[1] is not None,
            what="the end of the rank that waits",
            still_possible=hanging.is_running,
        )
        assert hanging.codes == [None, 76], hanging.stderr
    text = stacks.read_text()
    assert f"more than engine.timeout_s {timeout_s}" in text
    assert "train/loop/loop.py" in text
    again = train(tmp_path, {}, data=data, settings={**settings, "train.steps": "8"})
    assert again.returncode == 0, again.stderr
    assert "resumed from step 4 " in again.stdout
    assert list(losses(run_dir)) == list(range(1, 9))


def test_a_rank_stopped_in_a_save_ends_the_run_and_is_named(
    make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    """Rank 1 is stopped in its second save. A wait for a save may be long, but not for that rank.

    Both modes at once: most of the time is the limit.
    """
    data = make_dataset()
    settings = {
        "checkpoint.every-steps": "2",
        "train.steps": "2",
        "optim.warmup-steps": "1",
    }
    SERVER.start()
    begun_s = time.monotonic()
    first = train(tmp_path / "first", {}, data=data, settings=settings)
    assert first.returncode == 0, first.stderr
    # A whole run took half as long on this machine as it is now; two start next.
    timeout_s = math.ceil(5 + 2 * (time.monotonic() - begun_s))
    settings |= {"train.steps": "4000", "engine.timeout-s": str(timeout_s)}
    plan = {"hang": {"rank": 1, "phase": "captured", "save": 2}}
    with ExitStack() as started:
        runs = {}
        for mode in ("async", "sync"):
            more = {**settings, "checkpoint.mode": mode}
            words = words_of(tmp_path / mode, plan, data=data, settings=more)
            runs[mode] = started.enter_context(start_ranks(words, ranks=2))
        for mode, hanging in runs.items():
            check_stopped_in_save(hanging, tmp_path / mode / "run", timeout_s=timeout_s)


def check_stopped_in_save(hanging: Started, run_dir: Path, *, timeout_s: int) -> None:
    wait_until(
        lambda: hanging.is_running() and hanging.codes[0] is not None,
        what="the end of the rank that waits",
        still_possible=hanging.is_running,
    )
    assert hanging.codes == [76, None], hanging.stderr
    lines = [line for line in hanging.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, hanging.stderr
    status = read_status(run_dir)
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 76, 0)
    for text in (lines[0], status["reason"]):
        assert f"more than engine.timeout_s {timeout_s}" in text
        assert f"rank 1 (process {hanging.pids[1]}) was stopped" in text
    assert sorted(find_steps(str(run_dir / "checkpoints"))) == [2]
