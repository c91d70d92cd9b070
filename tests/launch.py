"""Starts our programs as processes of their own, on one rank or several.

`run` and `start` fork them off a process that has imported torch already (`fork_server.py`).
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.limits import HANG_S, wait_until

REPOSITORY = Path(__file__).resolve().parents[1]
SERVER_FILE = Path(__file__).with_name("fork_server.py")
LAUNCHER_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
FIRST_PORT = 10_000
LAST_PORT = 30_000


def find_free_port() -> int:
    """Give a TCP port that is free now.

    It lies below the ports that Linux gives to outgoing connections (from 32,768 on): one of
    those could be taken between here and its use by any client on this machine.
    """
    while True:
        port = random.SystemRandom().randrange(FIRST_PORT, LAST_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def environment() -> dict[str, str]:
    """Give this process's environment for programs on the CPU, without what a launcher left in
    it."""
    env = {
        name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES
    }
    return env | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # torch announces renamed collectives on every rank; nothing in this project calls them.
        "PYTHONWARNINGS": "ignore",
    }


# ----------------------------------------------------------------------------------------- programs


def run(
    words: Sequence[str], *, ranks: int = 1, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is.

    Args:
        words: `-m MODULE WORD ...`, `-c CODE WORD ...` or `SCRIPT WORD ...`.
        ranks: processes; several get the variables that torchrun sets.
        env: the environment; `environment()` by default.

    Returns:
        The output of all ranks, and the exit code: that of one rank, or 1 if any of several failed.
    """
    with start(words, ranks=ranks, env=env) as started:
        code = started.wait()
        return subprocess.CompletedProcess(
            list(words), code, started.stdout, started.stderr
        )


def start(
    words: Sequence[str], *, ranks: int = 1, env: Mapping[str, str] | None = None
) -> Started:
    """Start a program as `run` does, and give its processes."""
    env = environment() if env is None else env
    if ranks == 1:
        return Started(words, [dict(env)])
    port = find_free_port()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return Started(words, [{**env, **meeting, **sizes, **place} for place in places])


class Started:
    """The ranks of one program; a context manager that kills those that are left.

    Args:
        words: the program.
        envs: the environment of each rank.

    Attributes:
        pids: numbers of the processes.
        codes: exit code of each rank; None while it runs.
    """

    def __init__(self, words: Sequence[str], envs: Sequence[Mapping[str, str]]) -> None:
        # All ranks append to the same two files, as they do under a launcher.
        self._out = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._err = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        self._connections: list[socket.socket] = []
        self.pids: list[int] = []
        self.codes: list[int | None] = []
        for env in envs:
            connection = SERVER.connect()
            request = {"words": list(words), "env": dict(env), "cwd": str(REPOSITORY)}
            descriptors = array.array("i", [self._out.fileno(), self._err.fileno()])
            connection.sendmsg(
                [json.dumps(request).encode()],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)],
            )
            connection.settimeout(HANG_S)
            self.pids.append(int(connection.recv(64)))
            self.codes.append(None)
            self._connections.append(connection)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()
        for connection in self._connections:
            connection.close()
        self._out.close()
        self._err.close()

    @property
    def stdout(self) -> str:
        """What all ranks have written to stdout so far."""
        return _text_of(self._out.fileno())

    @property
    def stderr(self) -> str:
        """What all ranks have written to stderr so far."""
        return _text_of(self._err.fileno())

    def is_running(self) -> bool:
        """Tell whether any rank still runs."""
        for rank, connection in enumerate(self._connections):
            if self.codes[rank] is None:
                connection.settimeout(0.0)
                with contextlib.suppress(BlockingIOError):
                    self.codes[rank] = int(connection.recv(64))
        return None in self.codes

    def send_signal(self, number: int) -> None:
        """Send a signal to every rank that runs."""
        self.is_running()
        for pid, code in zip(self.pids, self.codes, strict=True):
            if code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self) -> int:
        """Wait for the end of all ranks and give the exit code.

        Once a rank has failed the others are told to end, as launchers do.
        """
        told = False

        def is_over() -> bool:
            nonlocal told
            running = self.is_running()
            if running and not told and any(self.codes):
                told = True
                self.send_signal(signal.SIGTERM)
            return not running

        wait_until(is_over, what=f"the end of {self.pids}")
        if len(self.codes) == 1:
            return self.codes[0] or 0
        return int(any(self.codes))


def _text_of(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode(errors="replace")


# --------------------------------------------------------------------------------------- the server


class _Server:
    """The fork server of this process, started by the first connection."""

    def __init__(self) -> None:
        self.pid = 0
        self._path = ""

    def connect(self) -> socket.socket:
        """Give a connection for one request."""
        self.start()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self._path)
        return connection

    def start(self) -> None:
        """Start it if it does not run yet; takes as long as importing torch and DeepSpeed."""
        if self.pid:
            return
        folder = tempfile.mkdtemp(prefix="fork-")
        self._path = f"{folder}/socket"
        process = subprocess.Popen(
            [sys.executable, str(SERVER_FILE), self._path],
            env=environment() | {"MPLBACKEND": "Agg"},
            stdin=subprocess.DEVNULL,
        )
        self.pid = process.pid
        atexit.register(_end, process, folder)
        wait_until(
            Path(self._path).exists,
            what="the fork server's start",
            still_possible=lambda: process.poll() is None,
        )


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


SERVER = _Server()
