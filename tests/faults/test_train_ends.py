"""What ends a run is named once, in one line, with the promised exit code and in status.json: the
rank that died, not those that noticed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.train_runs import TINY, losses, words_of
from tests.launch import Started, environment, find_free_port
from tests.launch import start as start_ranks
from tests.limits import HANG_S, wait_until
from train.process.outcome import read_status

pytestmark = pytest.mark.slow

SETTINGS = {
    "train.steps": "100000",
    "optim.warmup-steps": "1",
    "checkpoint.every-steps": "50000",
}


def given(run_dir: Path, data: str, **more: str) -> list[str]:
    """Write the command line of `train.pretrain`."""
    settings = {**TINY, **SETTINGS, "data.train": data, "run.dir": str(run_dir)}
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return ["-m", "train.pretrain", "demo", *words]


def envs_of(
    ranks: int, *, world_size: int, host: str, port: int
) -> list[dict[str, str]]:
    """Give what a launcher tells each rank."""
    meeting = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
    }
    return [
        environment() | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(ranks)
    ]


def check_end(
    run_dir: Path, said: str, *, code: int, says: list[str], state: str = "failed"
) -> dict[str, Any]:
    """Check what a run has left: one message, no traceback, and the same in status.json."""
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    status = read_status(run_dir)
    assert (status.get("state"), status.get("exit_code")) == (state, code), said
    for text in says:
        assert text in line
        assert text in status["reason"]
    return status


@pytest.mark.parametrize(
    ("fault", "dead"),
    [
        ({"kill": {"rank": 1, "step": 3}}, 1),
        ({"kill": {"rank": 0, "step": 3}}, 0),
        ({"kill": {"rank": 1, "phase": "captured", "save": 1}}, 1),
    ],
)
def test_the_rank_that_was_killed_is_named(
    make_dataset: Callable[..., str], tmp_path: Path, fault: dict[str, Any], dead: int
) -> None:
    settings = {**SETTINGS, "checkpoint.every-steps": "4"}
    words = words_of(tmp_path, fault, data=make_dataset(), settings=settings)
    with start_ranks(words, ranks=2) as started:
        started.wait()
        codes: list[int | None] = [76, 76]
        codes[dead] = -signal.SIGKILL
        assert started.codes == codes, started.stderr
        says = [f"rank {dead} (process {started.pids[dead]}) was killed or crashed"]
        status = check_end(tmp_path / "run", started.stderr, code=76, says=says)
    assert status["rank"] == 1 - dead


def test_ranks_that_do_not_meet_say_why(
    make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    data = make_dataset()

    # Another program listens on the port, and speaks another language.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        envs = envs_of(2, world_size=2, host="127.0.0.1", port=port)
        with Started(given(tmp_path / "port", data), envs) as started:
            started.wait()
            says = [f"port {port} is in use", "--master_port"]
            check_end(tmp_path / "port", started.stderr, code=76, says=says)
            assert started.codes == [76, 76]

    # No such host.
    envs = envs_of(2, world_size=2, host="nowhere.invalid", port=find_free_port())
    words = given(tmp_path / "host", data, engine__timeout_s="2")
    with Started(words, envs) as started:
        started.wait()
        says = ["'nowhere.invalid'", "is not known", "MASTER_ADDR"]
        check_end(tmp_path / "host", started.stderr, code=76, says=says)

    # Three ranks were announced and two were started.
    envs = envs_of(2, world_size=3, host="127.0.0.1", port=find_free_port())
    batch = {"train__global-batch-size": "18"}
    words = given(tmp_path / "missing", data, engine__timeout_s="5", **batch)
    with Started(words, envs) as started:
        started.wait()
        says = ["2 of 3 ranks came", "missing: rank 2"]
        check_end(tmp_path / "missing", started.stderr, code=76, says=says)

    # Rank 0 was not started.
    envs = envs_of(2, world_size=2, host="127.0.0.1", port=find_free_port())[1:]
    words = given(tmp_path / "first", data, engine__timeout_s="2")
    with Started(words, envs) as started:
        started.wait()
        says = ["rank 0 did not answer at 127.0.0.1:"]
        check_end(tmp_path / "first", started.stderr, code=76, says=says)


def test_mistakes_in_the_settings_are_in_the_status_of_ranks(tmp_path: Path) -> None:
    words = given(tmp_path / "run", "shards", optim__base_lrr="1")
    with start_ranks(words, ranks=2) as started:
        # Not told to end once one has failed, as a launcher tells them: each has its own code.
        wait_until(lambda: not started.is_running(), what="the end of both ranks")
        assert started.codes == [2, 2]
        check_end(tmp_path / "run", started.stderr, code=2, says=["unknown setting"])


# ------------------------------------------------------------------------------------- launchers


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators=2"]


@contextmanager
def launched(
    command: list[str], words: list[str]
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a launcher for real in a session of its own, with its output in a file."""
    said = Path(words[words.index("--run.dir") + 1]).with_suffix(".out")
    with said.open("w") as file:
        process = subprocess.Popen(
            [*command, *words],
            env=environment(),
            stdout=file,
            stderr=file,
            text=True,
            start_new_session=True,
        )
    try:
        yield process, said
    finally:
        for pid in [process.pid, *ranks_of(process).values()]:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait(HANG_S)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Give the process of each rank below a launcher."""
    found = {}
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    for child in children:
        try:
            env = child.environ()
        except psutil.Error:
            continue
        if "RANK" in env and "train.pretrain" in " ".join(child.cmdline()):
            found[int(env["RANK"])] = child.pid
    return found


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("dead", [0, 1])
def test_launchers_leave_the_name_of_the_rank_that_died(
    make_dataset: Callable[..., str], tmp_path: Path, launcher: str, dead: int
) -> None:
    run_dir = tmp_path / "run"
    words = given(run_dir, make_dataset())
    command = TORCHRUN
    if launcher == "deepspeed":
        command = [*DEEPSPEED, f"--master_port={find_free_port()}"]
        words = ["--module", *words[1:]]
    with launched(command, words) as (process, said):
        wait_until(
            lambda: losses(run_dir),
            what="the first step",
            still_possible=lambda: process.poll() is None,
        )
        pid = ranks_of(process)[dead]
        os.kill(pid, signal.SIGKILL)
        process.wait(HANG_S)
        ours = [
            line for line in said.read_text().splitlines() if line.startswith("error: ")
        ]
    assert len(ours) == 1
    status = read_status(run_dir)
    assert (status["state"], status["exit_code"], status["rank"]) == (
        "failed",
        76,
        1 - dead,
    )
    assert f"rank {dead} (process {pid}) was killed or crashed" in status["reason"]
