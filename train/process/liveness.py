"""Whether the process that wrote something down still lives: told by name, boot and start time.
Imports no torch.

A process number alone says little. It is given again after some minutes, counts anew in every
container, and means another process on another machine.
"""

from __future__ import annotations

import os
import socket
import time
from calendar import timegm
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

BEAT_S = 15.0
"""How often a run says that it is alive: the lease is touched, `heartbeat` in status.json set."""
STALE_S = 120.0
"""A run on another machine that has said nothing for so long is gone: eight beats."""
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
"""UTC, as in status.json."""
_SAME_START_S = 1.0
"""The kernel counts start times in hundredths of a second since boot, and the boot's own time moves
a little whenever the clock is set."""
Verdict = Literal["running", "gone", "ended", "unknown"]


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, unlike any other of any machine.

    Args:
        host: name of the machine or container.
        boot_id: this start of the machine; empty if the system does not say.
        pid_namespace: within which `pid` counts; empty if the system does not say.
        pid: number of the process.
        started_s: when it started, in seconds since 1970.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started_s: float

    def to_json(self) -> dict[str, Any]:
        """Give what status.json holds under `process`."""
        return asdict(self)


def this_process() -> Identity:
    """Tell which process this is."""
    # Containers may share a host name; process numbers only mean something within one namespace.
    namespace = ""
    with suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    boot_id = ""
    with suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Identity(
        host=socket.gethostname(),
        boot_id=boot_id,
        pid_namespace=namespace,
        pid=os.getpid(),
        started_s=psutil.Process().create_time(),
    )


def is_alive(process: Identity) -> bool | None:
    """Tell whether a process lives; None if it belongs to a machine that cannot be asked from here.

    Args:
        process: as it was written down, perhaps long ago.
    """
    here = this_process()
    # All three: a container has the host's boot, and may have its name.
    places = (process.host, process.boot_id, process.pid_namespace)
    if places == (here.host, here.boot_id, here.pid_namespace):
        return _is_running(process)

    # This machine, before its last start: no process outlives that.
    has_restarted = process.boot_id not in ("", here.boot_id)
    if process.host == here.host and has_restarted:
        return False
    return None


def _is_running(process: Identity) -> bool:
    try:
        found = psutil.Process(process.pid)
        same = abs(float(found.create_time()) - process.started_s) < _SAME_START_S
        # A zombie has ended; only its parent has not asked yet.
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        # No such process; one that may not be looked at still gives its start time.
        return False


def judge_status(status: Mapping[str, Any], *, now_s: float | None = None) -> Verdict:
    """Tell from a status.json whether its run is alive: the one rule for everything that reads it.

    Args:
        status: what the file holds; empty if there is none.
        now_s: seconds since 1970; the clock's by default.

    Returns:
        ended: the run wrote how it ended. running: its process lives, or another machine's process
        has said so within `STALE_S`. gone: the file says running, but the process has died without
        a word, e.g. by SIGKILL or with its machine. unknown: written by a release that did not name
        its process.
    """
    # First: the process of an ended run is gone, too, and has left its word.
    if status.get("exit_code") is not None:
        return "ended"
    try:
        process = Identity(**status["process"])
        heard_s = timegm(time.strptime(status["heartbeat"], TIME_FORMAT))
    except (KeyError, TypeError, ValueError):
        return "unknown"

    alive = is_alive(process)
    if alive is None:
        # Clocks of two machines differ, by seconds if they are set over the network.
        now_s = time.time() if now_s is None else now_s
        alive = now_s - heard_s < STALE_S
    return "running" if alive else "gone"


def now_text() -> str:
    """Give the time as status.json writes it."""
    return time.strftime(TIME_FORMAT, time.gmtime())
