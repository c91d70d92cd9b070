"""What a benchmark reads off the system: CPU time with children, peak memory, the machine itself.

Loads no torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import InfrastructureError

_PR_SET_CHILD_SUBREAPER = 36
"""Source: prctl(2)."""
_INSTRUCTIONS = {
    "avx512": ("avx512f",),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
}
"""What decides how fast a CPU multiplies, by the flags of /proc/cpuinfo that mean it (x86, ARM)."""


# --------------------------------------------------------------------------- this process


def cpu_s() -> float:
    """Return CPU seconds of this process, its threads, and all its children so far.

    Children that have ended count once their parent has waited for them.
    """
    mine = os.times()
    of_children_s = mine.children_user + mine.children_system
    total = time.process_time() + of_children_s
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            # Its own user and system time, then those of its children that have ended.
            times = child.cpu_times()
            total += sum(times[:4])
    return total


def rss_bytes() -> int:
    """Return the memory that this process and its children hold now; shared pages count twice."""
    me = psutil.Process()
    total = int(me.memory_info().rss)
    for child in me.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += int(child.memory_info().rss)
    return total


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held since it started."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            # In kB, which the kernel counts as 1,024 bytes.
            kib, *_ = value.split()
            return int(kib) * 1024
    raise InfrastructureError(
        "/proc/self/status has no line VmHWM: the peak of memory is unknown"
    )


# ------------------------------------------------------------------------- another command


def run_counted(command: Sequence[str]) -> dict[str, float]:
    """Run a command to its end and count everything that it started.

    Args:
        command: Words of the command.

    Returns:
        wall_s until the command ended; cpu_s of the command and all its descendants; peak_mib of
        the largest of these processes.

    Raises:
        InfrastructureError: The command failed.
    """
    me = psutil.Process()
    before = {child.pid for child in me.children()}
    # A file, not a pipe: a fork server that the command leaves behind holds a pipe open, and
    # waiting for its end would count as time of the command.
    with _adopting_orphans(), tempfile.TemporaryFile("w+") as said:
        start_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start_s
        # Popen must not wait again for a process that is gone.
        process.returncode = os.waitstatus_to_exitcode(status)
        uses = [used, *_wait_for_orphans(before)]
        said.seek(0)
        errors = said.read().strip()
    if process.returncode:
        raise InfrastructureError(
            f"{' '.join(command[:4])} ended with code {process.returncode}: {errors[-500:]}"
        )
    used_s = 0.0
    for use in uses:
        used_s += use.ru_utime + use.ru_stime
    # Linux gives kilobytes here.
    peak_kib = max(use.ru_maxrss for use in uses)
    return {
        "wall_s": wall_s,
        "cpu_s": used_s,
        "peak_mib": peak_kib / 1024,
    }


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Become the parent of what a command leaves behind.

    multiprocessing's fork server outlives the command that started it, so the command never waits
    for it: the CPU time of all its workers would go to init, uncounted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _wait_for_orphans(before: Collection[int]) -> Iterator[Any]:
    """Wait for the processes that became children of this one, and yield what each used.

    Args:
        before: children of this process that are none of the command's.
    """
    # One that ends may leave children of its own, so that they are looked for again.
    while orphans := [
        c.pid for c in psutil.Process().children() if c.pid not in before
    ]:
        for pid in orphans:
            _, _, used = os.wait4(pid, 0)
            yield used


# --------------------------------------------------------------------------------- machine


def machine() -> dict[str, Any]:
    """Return what a reader of figures must know of the machine, the code and the moment."""
    model, flags = _processor()
    about: dict[str, Any] = {"cpu": model}
    for name, wanted in _INSTRUCTIONS.items():
        about[name] = "no"
        if flags.intersection(wanted):
            about[name] = "yes"
    if gpu := _gpu():
        about["gpu"] = gpu
    return about | {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": commit_of(Path(__file__).parent),
    }


def _processor() -> tuple[str, set[str]]:
    """Return the processor's model and its flags."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            # The first processor stands for all of them.
            facts.setdefault(name.strip(), value.strip())
    flags = facts.get("flags") or facts.get("Features", "")
    model = facts.get("model name") or platform.machine()
    return model, set(flags.split())


def _gpu() -> str:
    # Asked of torch only if the benchmark has loaded it: one without torch uses no GPU.
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_name())


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout, with `-dirty` if it was changed; empty without git."""
    command = ["git", "describe", "--always", "--dirty"]
    with suppress(OSError):
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()
    return ""
