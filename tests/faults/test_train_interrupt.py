"""Ctrl-C and SIGTERM during a start: one line, the promised code, and no state `failed`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.test_train_ends import DEEPSPEED, TORCHRUN, given, launched, ranks_of
from tests.launch import Started, environment, find_free_port
from tests.limits import HANG_S, wait_until
from train.process.outcome import read_status

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "code", "state", "says"),
    [
        (signal.SIGINT, 130, "interrupted", "stopped before training began"),
        (signal.SIGTERM, 75, "preempted", "stopped (SIGTERM) before training began"),
        (signal.SIGHUP, 75, "preempted", "stopped (SIGHUP) before training began"),
    ],
)
def test_a_rank_that_waits_for_the_others_hears_signals(
    make_dataset: Callable[..., str],
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    state: str,
    says: str,
) -> None:
    """Rank 1 never comes; rank 0 is told to stop while it waits for it."""
    run_dir = tmp_path / "run"
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    words = given(run_dir, make_dataset())
    with Started(words, [environment() | meeting | place]) as started:
        wait_until(
            lambda: read_status(run_dir).get("state") == "running",
            what="the start",
            still_possible=started.is_running,
        )
        started.send_signal(number)
        started.wait()
        assert started.codes == [code], started.stderr
        assert started.stderr.count(says) == 1
        assert "Traceback" not in started.stderr
    status = read_status(run_dir)
    assert (status["state"], status["exit_code"]) == (state, code)


def loads_torch(pid: int) -> bool:
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ctrl_c_on_a_launcher_while_torch_is_imported(
    make_dataset: Callable[..., str], tmp_path: Path, launcher: str
) -> None:
    run_dir = tmp_path / "run"
    words = given(run_dir, make_dataset())
    command = TORCHRUN
    if launcher == "deepspeed":
        command = [*DEEPSPEED, f"--master_port={find_free_port()}"]
        words = ["--module", *words[1:]]
    with launched(command, words) as (process, said):
        wait_until(
            lambda: (
                [loads_torch(pid) for pid in ranks_of(process).values()] == [True, True]
            ),
            what="both ranks in the import of torch",
            still_possible=lambda: process.poll() is None,
        )
        ranks = [psutil.Process(pid) for pid in ranks_of(process).values()]
        # As a terminal does: launcher and ranks at once.
        os.killpg(process.pid, signal.SIGINT)
        process.wait(HANG_S)
        _, alive = psutil.wait_procs(ranks, timeout=HANG_S)
        text = said.read_text()
    assert not alive
    # Launchers have tracebacks of their own; no rank has one, and one of them speaks.
    assert 'File "' not in text.partition("Traceback")[0]
    assert "train/" not in text, text
    ours = [line for line in text.splitlines() if "stopped before" in line]
    assert len(ours) == 1, text
    assert read_status(run_dir).get("state") in (None, "interrupted")
