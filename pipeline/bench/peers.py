"""Measure this loader next to others: `python -m pipeline.bench --peers`.

Every subject lives in a process of its own and waits for its turn. CPU time counts the process,
its threads and its children; wall time is given too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from pipeline.bench.probes import cpu_s, rss_bytes
from pipeline.bench.subjects import GPU_SUBJECTS, SUBJECTS, Batches, Setup, Subject
from pipeline.bench.turns import Figures, Turns
from pipeline.console import say

_WARM_UP_BATCHES = 4
_ALL = (*SUBJECTS, *GPU_SUBJECTS)
"""A subject's process finds it by its index in here."""


@dataclass(frozen=True)
class PeerRow:
    """One subject's figures.

    Args:
        name: Subject.
        dataset: What it read.
        resize_filter: How it resized.
        first_batch_s: From the start of its process's work, imports done, to the first batch.
        cpu_ms_per_image: One value per round.
        images_per_s: One value per round, wall time.
        rss_mib: Memory of the process and its children at the end.
        problem: Why there are no figures; empty if there are.
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
    setup: Setup,
    *,
    repeats: int = 5,
    seconds: float = 2.0,
    subjects: Sequence[Subject] = SUBJECTS,
) -> list[PeerRow]:
    """Measure subjects in turns.

    Args:
        setup: Datasets, threads, batch.
        repeats: Rounds.
        seconds: Length of one turn.
        subjects: What to measure.
    """
    runners = [_Runner(setup, subject) for subject in subjects]
    turns = Turns("bench", rounds=repeats)
    try:
        # One after the other: a start must not be measured against another's.
        for count, runner in enumerate(runners, start=1):
            runner.start()
            problem = ""
            if runner.problem:
                problem = f": {runner.problem}"
            say(f"bench: started {count} of {len(runners)}, {runner.title}{problem}")
        measurements = {runner.title: runner.turn(seconds) for runner in runners}
        for _ in turns.rounds():
            turns.take(measurements)
    finally:
        for runner in runners:
            runner.close()
    return [runner.row(turns) for runner in runners]


class _Runner:
    """A subject's process, seen from the parent."""

    def __init__(self, setup: Setup, subject: Subject) -> None:
        self._setup = setup
        self._subject = subject
        self.title = f"{subject.name} on {subject.dataset}, {subject.resize_filter}"
        self.problem = ""
        self._first_batch_s = 0.0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process and wait for its first batch."""
        setup = self._setup
        # By number, because builders are functions, which cannot be written on a command line.
        index = _ALL.index(self._subject)
        words = (index, setup.folder, setup.num_threads, setup.batch_size, setup.device)
        command = [sys.executable, "-m", "pipeline.bench.peers"]
        command += [str(word) for word in words]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Threads are the subject's to start; a pool of OpenMP's own would come on top.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        answer = self._answer(self._process)
        self._first_batch_s = float(answer.get("first_batch_s", 0.0))

    def turn(self, seconds: float) -> Callable[[], Figures]:
        """Give what has the process measure itself once; no figures once it has failed."""

        def measure() -> Figures:
            process = self._process
            if self.problem or process is None or process.stdin is None:
                return {}
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            return self._answer(process)

        return measure

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        # A process that has ended closes its pipe: an empty line, without the newline.
        if line:
            answer = json.loads(line)
        else:
            answer = {"problem": f"ended with code {process.wait()}"}
        self.problem = str(answer.pop("problem", ""))
        return dict(answer)

    def close(self) -> None:
        """End the process and its children."""
        process = self._process
        if process is None:
            return
        # Children first: once their parent has gone, they can no longer be found by it.
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            for child in parent.children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def row(self, turns: Turns) -> PeerRow:
        """Return the figures of all rounds."""
        # The last round's, when everything has been allocated that ever will be.
        rss = turns.values(self.title, "rss_bytes")
        rss_mib = 0.0
        if rss:
            rss_mib = rss[-1] / 2**20
        return PeerRow(
            self._subject.name,
            self._subject.dataset,
            self._subject.resize_filter,
            self._first_batch_s,
            turns.values(self.title, "cpu_ms_per_image"),
            turns.values(self.title, "images_per_s"),
            rss_mib,
            self.problem,
        )


# ------------------------------------------------------------------------- in the subject's process


def _measure_once(batches: Batches, seconds: float, device: str) -> dict[str, float]:
    # What was prefetched while others were measured does not count.
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    images = 0
    start_cpu_s = cpu_s()
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < seconds:
        images += next(batches)
    # Work on a GPU is only queued when a batch is handed over.
    if device != "cpu":
        torch.cuda.synchronize()
    wall_s = time.perf_counter() - start_s
    used_cpu_s = cpu_s() - start_cpu_s
    return {
        "cpu_ms_per_image": 1e3 * used_cpu_s / images,
        "images_per_s": images / wall_s,
        "rss_bytes": rss_bytes(),
    }


def _serve(subject: Subject, setup: Setup, commands: TextIO, answers: TextIO) -> None:
    def answer(figures: dict[str, Any]) -> None:
        answers.write(json.dumps(figures) + "\n")
        answers.flush()

    start_s = time.perf_counter()
    try:
        batches = iter(subject.build(setup, subject))
        next(batches)
    except ImportError as error:
        answer({"problem": f"not installed ({error.name})"})
        return
    except Exception as error:  # noqa: BLE001 - a peer that does not run here is a row of the table
        problem = f"does not run here ({type(error).__name__}: {error})"
        # One line: the answer becomes a cell of a Markdown table.
        first_line, *_ = problem.splitlines()
        answer({"problem": first_line})
        return
    answer({"first_batch_s": time.perf_counter() - start_s})
    for line in commands:
        figures = _measure_once(batches, float(line), setup.device)
        answer(figures)


def _main() -> None:
    index, folder, num_threads, batch_size, device = sys.argv[1:]
    # Whatever a library prints goes to stderr; answers have the real stdout to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threads = int(num_threads)
    setup = Setup(Path(folder), threads, int(batch_size), device)
    subject = _ALL[int(index)]
    _serve(subject, setup, sys.stdin, answers)
    # Some of the libraries hang when they are asked to end.
    os._exit(0)


if __name__ == "__main__":
    _main()
