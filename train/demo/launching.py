"""Run the project's own commands from a program: printed as one would type them, stopped in an
orderly way.

Every command runs in a session of its own. Ctrl-C on a terminal then reaches this program alone,
which decides how the command ends; otherwise launcher, ranks and workers would each answer it.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from pipeline.errors import ConfigError, MaelstromError
from train.process.outcome import read_status

POLL_S = 0.2
"""How often a running command is looked at."""
STOP_LIMIT_S = 300.0
"""How long a training may take to save and end before it is killed."""
KILL_LIMIT_S = 10.0
"""How long the kernel may take to end killed processes; one that waits for a disk takes longer."""
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a scheduler's or service's stop, and a terminal that was closed."""
# What signal.signal takes and gives back.
Handler = Callable[[int, FrameType | None], Any] | int | None


class StageFailed(MaelstromError):  # noqa: N818 - named for what happened
    """A command that ended with an error of its own, which it has already explained."""

    def __init__(self, stage: str, exit_code: int) -> None:
        super().__init__(f"{stage} ended with exit code {exit_code}")
        self.stage = stage
        self.exit_code = exit_code


class Interrupts:
    """Notes the signals that ask this program to stop, while a child of it runs.

    A KeyboardInterrupt may come between starting a process and keeping its number; that process
    would be left behind. A noted signal is answered at the next look. Use it as a context manager,
    in the main thread.
    """

    def __init__(self) -> None:
        self.count = 0
        """How often this program was asked to stop."""
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Interrupts:
        # Handlers run in the main thread between two instructions: counting is all that they may
        # do safely.
        for number in INTERRUPTS:
            # nohup has SIGHUP ignored, and a shell's background job SIGINT: they stay so.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def raise_interrupts() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, when no child runs."""
    for number in INTERRUPTS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


# -------------------------------------------------------------------------------------- any command
def run_stage(
    stage: str, command: Sequence[str], *, env: Mapping[str, str] | None = None
) -> None:
    """Print a command and run it to its end.

    Args:
        stage: what it is, for a message.
        command: program and words.
        env: its environment; this process's own by default.

    Raises:
        StageFailed: it ended with a code other than 0.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the command was killed. Every command goes on
            where a killed one was.
    """
    print_command(command)
    with Interrupts() as interrupts:
        process = subprocess.Popen(command, env=env, start_new_session=True)
        while not _has_ended(process):
            if interrupts.count:
                kill_session(process)
                raise KeyboardInterrupt
        # A converter's fork server lives a little longer than the converter.
        kill_session(process)
    code = process.returncode
    # A process that a signal ended has its number, negative; shells say 128 and the number.
    if code < 0:
        code = 128 - code
    if code:
        raise StageFailed(stage, code)


def kill_session(process: subprocess.Popen[Any]) -> None:
    """End a process that was started as the leader of a session, and all that it has started, and
    wait until they are gone. The leader may have ended before."""
    deadline_s = time.monotonic() + KILL_LIMIT_S
    # Again until none is left: a launcher may have started another process in between.
    while members := _living_members(process.pid):
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.02)
    # The leader is our child: without a wait it would stay behind as a zombie.
    process.wait()


def _living_members(session: int) -> list[psutil.Process]:
    """Find the processes of a session: unlike children, they are found when their parent has
    ended."""
    members = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            is_member = os.getsid(process.pid) == session
            # A zombie has ended; only its parent's wait can remove it.
            if is_member and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def _has_ended(process: subprocess.Popen[Any]) -> bool:
    """Wait a moment for a process; tell whether it has ended."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(POLL_S)
    return process.returncode is not None


# ----------------------------------------------------------------------------------------- training
def run_training(
    command: Sequence[str],
    *,
    run_dir: Path,
    stop_at: int | None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Print a training command and run it to its end, or stop it after some steps.

    Args:
        command: program and words, launcher included.
        run_dir: the run's folder, whose status.json is read.
        stop_at: step after which the ranks are told to stop; None lets them finish.
        env: environment.

    Raises:
        StageFailed: it failed; with the code of status.json, because launchers flatten codes.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, once the ranks have saved and ended.
    """
    print_command(command)
    # Of an earlier launch: its file is there until the new ranks write theirs.
    earlier = read_status(run_dir).get("launch")
    told = False
    with Interrupts() as interrupts:
        process = subprocess.Popen(command, env=env, start_new_session=True)
        while not _has_ended(process):
            if interrupts.count:
                _stop_training(process, run_dir, interrupts, earlier=earlier)
                raise KeyboardInterrupt
            if stop_at is None or told:
                continue
            status = _running_status(run_dir, earlier=earlier)
            if status.get("step", 0) >= stop_at:
                told = True
                stop_ranks(process)

    # The launcher ends with an error of its own when ranks were told to stop: the run's own word
    # counts.
    status = read_status(run_dir)
    state = status.get("state")
    ended_as_told = told and state in ("preempted", "done")
    if process.returncode == 0 or ended_as_told:
        return
    code = abs(process.returncode)
    if state in ("failed", "preempted"):
        code = status.get("exit_code") or code
    raise StageFailed("training", code)


def stop_ranks(process: subprocess.Popen[Any]) -> None:
    """Tell the ranks below a deepspeed launcher to save and end.

    The outer launcher would go away without passing a signal on. The one below it passes SIGTERM
    on, but kills ranks that have not ended 30 s later: a slow machine may still be on its way to
    the first step then. So the ranks are told directly; both launchers end after them.
    """
    with suppress(psutil.NoSuchProcess):
        for launcher in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess):
                for rank in launcher.children():
                    rank.send_signal(signal.SIGTERM)


def _running_status(run_dir: Path, *, earlier: str | None) -> dict[str, Any]:
    """Read the run's status if it is of this launch and not of an earlier one; empty otherwise.

    A launch says that it is running when all its ranks answer SIGTERM by saving, and not before.
    """
    status = read_status(run_dir)
    is_running = status.get("state") == "running"
    if is_running and status.get("launch") != earlier:
        return status
    return {}


def _stop_training(
    process: subprocess.Popen[Any],
    run_dir: Path,
    interrupts: Interrupts,
    *,
    earlier: str | None,
) -> None:
    """Let the ranks save and end; kill them if there is nothing to save yet, if that takes too long
    or if this program is interrupted again."""
    if not _running_status(run_dir, earlier=earlier):
        # Launchers and ranks still import torch, which can take a minute: no step was taken.
        kill_session(process)
        return
    sys.stderr.write(
        "\nstopping: the ranks save first (Ctrl-C again ends them at once)\n"
    )
    # What was counted so far asked for this stop; only more than that asks for a quicker one.
    asked = interrupts.count
    deadline_s = time.monotonic() + STOP_LIMIT_S
    stop_ranks(process)
    while not _has_ended(process):
        is_late = time.monotonic() > deadline_s
        if interrupts.count > asked or is_late:
            kill_session(process)


def deepspeed_command(recipe: str, settings: Sequence[str], *, ranks: int) -> list[str]:
    """Write the command that trains a recipe on this machine under the deepspeed launcher.

    Args:
        recipe: name of the recipe.
        settings: words after it.
        ranks: processes.

    Raises:
        ConfigError: the launcher is not installed next to this Python.
    """
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.exists():
        raise ConfigError(
            f"{launcher}: not there; install the project into this environment (make setup)"
        )
    # The launcher's own errors only repeat what a rank has said, or that it was told to stop.
    options = ["--log_level", "critical", "--num_gpus", str(ranks)]
    # A fixed port would collide with another training on this machine.
    options += ["--master_port", str(free_port()), "--module"]
    return [str(launcher), *options, "train.pretrain", recipe, *settings]


def environment(*, ranks: int, has_gpu: bool) -> dict[str, str]:
    """Give the environment for several ranks on one machine: cores shared out, launcher chatter
    left out.

    Args:
        ranks: processes.
        has_gpu: whether they compute on GPUs.
    """
    cores_per_rank = len(os.sched_getaffinity(0)) // ranks
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores_per_rank)),
        # torch 2.13 announces renamed collectives on every rank; no code of this project calls
        # them.
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if not has_gpu:
        # Otherwise the launcher looks for a GPU and warns that there is none.
        defaults["DS_ACCELERATOR"] = "cpu"
    return {**defaults, **os.environ}


def free_port() -> int:
    """Find a TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        _, port = probe.getsockname()
        return int(port)


def print_command(command: Sequence[str]) -> None:
    """Print a command as one would type it from the current folder."""
    here = f"{Path.cwd()}{os.sep}"
    program, *words = command
    typed = shlex.join([program.removeprefix(here), *words])
    sys.stdout.write(f"$ {typed}\n")
    # The command writes to the same place, and must not come before its own line.
    sys.stdout.flush()
