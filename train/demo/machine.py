"""What this machine can do: its ranks, the faster precision, and how long a step takes.

Times are taken by as many processes at once as will train, because they share caches, memory and
perhaps cores. None of them is this process: it imports no torch, and so answers Ctrl-C at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pipeline.errors import InfrastructureError
from train.demo.launching import Interrupts, environment, kill_session

MAX_RANKS = 8
RUN_OVER_ALONE = 1.1
"""Time of a step in a run over that of a step alone: gradients are exchanged, batches come in."""


@dataclass(frozen=True)
class Found:
    """What is seen without timing a step.

    Attributes:
        gpus: how many torch sees.
        bf16_over_fp32: time of a bf16 matrix product over that of an fp32 one; None on a GPU.
        start_s: seconds until a process has imported torch.
    """

    gpus: int
    bf16_over_fp32: float | None
    start_s: float

    @property
    def precision(self) -> str:
        """The faster setting of `engine.precision`."""
        if self.bf16_over_fp32 is None:
            return "bf16"
        # On a CPU autocast, because bf16 weights are DeepSpeed's for GPUs.
        if self.bf16_over_fp32 < 1:
            return "autocast"
        return "fp32"

    def explain_precision(self) -> str:
        """Say in one line why this precision was chosen."""
        if self.bf16_over_fp32 is None:
            return f"training on a GPU: engine.precision {self.precision}"
        return (
            f"bf16 products take {self.bf16_over_fp32:.2f}x the time of fp32 here: "
            f"engine.precision {self.precision}"
        )


@dataclass(frozen=True)
class Speed:
    """How fast this machine is.

    Attributes:
        step_s: seconds of a training step, all ranks working.
        features_per_s: images per second that an evaluation reads the features of.
    """

    step_s: float
    features_per_s: float


class Machine:
    """The processes that look at this machine. Use it as a context manager; they end with it.

    Args:
        ranks: processes that will train; 0 is one per GPU, or one per core up to 8.
    """

    def __init__(self, *, ranks: int = 0) -> None:
        self._asked_ranks = ranks
        self._processes: list[subprocess.Popen[str]] = []
        self._interrupts = Interrupts()

    def __enter__(self) -> Machine:
        # How many GPUs there are only torch can tell, which these processes are to import.
        cores = len(os.sched_getaffinity(0))
        count = self._asked_ranks or count_ranks(cores)
        env = environment(ranks=count, has_gpu=True)
        command = [sys.executable, "-m", "train.demo.speed"]
        self._start_s = time.monotonic()
        # From here on Ctrl-C is noted, for a process must not be lost between start and list.
        with self._interrupts:
            for _ in range(count):
                process = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                self._processes.append(process)
        if self._interrupts.count:
            self._end()
            raise KeyboardInterrupt
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def look(self) -> Found:
        """Wait until torch is imported, and say what is here."""
        # All of them, although they say the same: timing begins when none is busy importing.
        answers = [_read_answer(process) for process in self._processes]
        found = answers[0]
        start_s = time.monotonic() - self._start_s
        return Found(found["gpus"], found["bf16_over_fp32"], start_s)

    def ranks(self, found: Found) -> int:
        """Say how many processes will train."""
        if self._asked_ranks:
            return self._asked_ranks
        if found.gpus:
            return count_ranks(found.gpus)
        return len(self._processes)

    def time(self, found: Found, *, global_batch_size: int) -> Speed:
        """Time steps of the demo's model.

        Args:
            found: what `look` returned.
            global_batch_size: images of a step, over all ranks.
        """
        ranks = self.ranks(found)
        working = self._processes
        precision = found.precision
        if found.gpus:
            # Two processes would share a GPU here, but not in the run.
            working = self._processes[:1]
            # The plain engine that is timed has no bf16 weights; autocast is nearest.
            precision = "autocast"
        images = max(1, global_batch_size // ranks)
        asked = {"precision": precision, "images": images}
        # All are asked before the first is waited for, so that they work at once.
        for process in working:
            _ask(process, asked)
        answers = [_read_answer(process) for process in working]
        # Ranks wait for the slowest in every step.
        slowest_s = max(answer["step_s"] for answer in answers)
        # One process evaluates, on all the cores that these share.
        features_per_s = sum(answer["features_per_s"] for answer in answers)
        return Speed(step_s=RUN_OVER_ALONE * slowest_s, features_per_s=features_per_s)

    def _end(self) -> None:
        # Ctrl-C again must not keep a process alive.
        with self._interrupts:
            for process in self._processes:
                kill_session(process)
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()


def count_ranks(available: int) -> int:
    """Give the largest power of two up to 8 of GPUs or cores, at least 1: it divides the batch.

    Args:
        available: GPUs or cores.
    """
    ranks = 1
    while ranks * 2 <= min(available, MAX_RANKS):
        ranks *= 2
    return ranks


def _ask(process: subprocess.Popen[str], content: Mapping[str, Any]) -> None:
    assert process.stdin is not None, "started with a pipe"
    try:
        line = json.dumps(content)
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise _failed(process) from None


def _read_answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None, "started with a pipe"
    line = process.stdout.readline()
    # Empty, without a newline: the process has ended, and its pipe with it.
    if not line:
        raise _failed(process)
    answer: dict[str, Any] = json.loads(line)
    return answer


def _failed(process: subprocess.Popen[str]) -> InfrastructureError:
    return InfrastructureError(
        f"timing this machine ended with exit code {process.wait()}; what it wrote is above. "
        "Does `make test-unit` pass here?"
    )
