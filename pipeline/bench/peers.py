"""Measure this loader beside others: `python -m pipeline.bench --peers`.

Every subject lives in a process of its own and is measured in turn, several times over, so that a
busy minute of the machine falls on all of them. CPU time counts the process, its threads and its
children; wall time is given beside it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from pipeline.bench.subjects import GPU_SUBJECTS, SUBJECTS, Batches, Setup, Subject
from pipeline.console import say

_START_LIMIT_S = 120.0
_WARM_UP_BATCHES = 4
_ALL = (*SUBJECTS, *GPU_SUBJECTS)
"""A subject's process finds it by its number in here."""


@dataclass(frozen=True)
class Measured:
    """One subject's repeats.

    Args:
        name: Subject.
        dataset: What it read.
        resize_filter: How it resized.
        first_batch_s: From the start of its process's work, imports done, to the first batch.
        cpu_ms_per_image: One value a repeat.
        images_per_s: One value a repeat, wall time.
        rss_mib: Memory of the process and its children at the end.
        problem: Why there is nothing to show.
    """

    name: str
    dataset: str
    resize_filter: str
    first_batch_s: float
    cpu_ms_per_image: list[float]
    images_per_s: list[float]
    rss_mib: float
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)


def measure_peers(
    setup: Setup, *, repeats: int = 5, seconds: float = 2.0, subjects: Sequence[Subject] = SUBJECTS
) -> list[Measured]:
    """Measure subjects in turn, `repeats` times over.

    Args:
        setup: Datasets, threads, batch.
        repeats: Rounds.
        seconds: Length of one measurement.
        subjects: What to measure.
    """
    runners = [_Runner(setup, _ALL.index(subject), subject) for subject in subjects]
    try:
        for (
            runner
        ) in runners:  # one after the other: a start must not be measured against another's
            runner.start()
            say(f"bench: started {runner.title}{': ' + runner.problem if runner.problem else ''}")
        for repeat in range(repeats):
            for runner in runners:
                runner.measure(seconds)
            say(f"bench: round {repeat + 1} of {repeats}")
    finally:
        for runner in runners:
            runner.close()
    return [runner.measured() for runner in runners]


class _Runner:
    """A subject's process, seen from the parent."""

    def __init__(self, setup: Setup, number: int, subject: Subject) -> None:
        self._setup = setup
        self._number = number
        self._subject = subject
        self.title = f"{subject.name} on {subject.dataset}, {subject.resize_filter}"
        self.problem = ""
        self._first_batch_s = 0.0
        self._results: list[dict[str, float]] = []

    def start(self) -> None:
        """Start the process and wait for its first batch."""
        setup = self._setup
        words = map(
            str, (self._number, setup.folder, setup.num_threads, setup.batch_size, setup.device)
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.bench.peers", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        answer = self._answer()
        self.problem = str(answer.get("problem", ""))
        self._first_batch_s = float(answer.get("first_batch_s", 0.0))

    def measure(self, seconds: float) -> None:
        """Have the process measure itself once."""
        if not self.problem:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
            answer = self._answer()
            self.problem = str(answer.pop("problem", ""))
            if not self.problem:
                self._results.append(answer)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"problem": f"ended with code {self._process.wait()}"}

    def close(self) -> None:
        """End the process and its children."""
        if not hasattr(self, "_process"):
            return
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                child.kill()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def measured(self) -> Measured:
        """Return the repeats."""
        return Measured(
            self._subject.name,
            self._subject.dataset,
            self._subject.resize_filter,
            self._first_batch_s,
            [1e3 * result["cpu_s"] / result["images"] for result in self._results],
            [result["images"] / result["wall_s"] for result in self._results],
            self._results[-1]["rss_bytes"] / 2**20 if self._results else 0.0,
            self.problem,
        )


def machine() -> dict[str, Any]:
    """Return what a reader must know of the machine and the moment."""
    model = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            model,
        )
    return {
        "cpu": model,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    with suppress(OSError):
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()
    return ""


# ------------------------------------------------------------------------- in the subject's process
def _cpu_s() -> float:
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def _rss_bytes() -> int:
    me = psutil.Process()
    total = int(me.memory_info().rss)
    for child in me.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += int(child.memory_info().rss)
    return total


def _measure_once(batches: Batches, seconds: float, device: str) -> dict[str, float]:
    for _ in range(_WARM_UP_BATCHES):  # what was prefetched while others were measured
        next(batches)
    cpu_s, start_s, images = _cpu_s(), time.perf_counter(), 0
    while time.perf_counter() - start_s < seconds:
        images += next(batches)
    if device != "cpu":
        torch.cuda.synchronize()
    wall_s = time.perf_counter() - start_s
    return {
        "images": images,
        "wall_s": wall_s,
        "cpu_s": _cpu_s() - cpu_s,
        "rss_bytes": _rss_bytes(),
    }


def _serve(subject: Subject, setup: Setup, commands: TextIO, answers: TextIO) -> None:
    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    start_s = time.perf_counter()
    try:
        batches = iter(subject.build(setup, subject))
        next(batches)
    except ImportError as error:
        answer({"problem": f"not installed ({error.name})"})
        return
    except Exception as error:  # noqa: BLE001 - a peer that does not run here is a row of the table
        answer({"problem": f"does not run here ({type(error).__name__}: {error})".splitlines()[0]})
        return
    answer({"first_batch_s": time.perf_counter() - start_s})
    for line in commands:
        answer(_measure_once(batches, float(line), setup.device))


def _main() -> None:
    number, folder, num_threads, batch_size, device = sys.argv[1:]
    # Whatever a library prints goes to stderr; answers have the real stdout to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = Setup(Path(folder), int(num_threads), int(batch_size), device)
    _serve(_ALL[int(number)], setup, sys.stdin, answers)
    os._exit(0)  # some of the libraries hang when they are asked to end


if __name__ == "__main__":
    _main()
