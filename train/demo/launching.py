"""Running the project's own commands from a program: printed as one would type them, stopped in an
orderly way."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from pipeline.errors import ConfigError, MaelstromError
from train.process.outcome import read_status

POLL_S = 0.2
"""How often a training is looked at while it runs."""
STOP_LIMIT_S = 120.0
"""How long a training may take to save and end before it is killed."""


class StageFailed(MaelstromError):  # noqa: N818 - named for what happened
    """A command that ended with an error of its own, which it has already explained."""

    def __init__(self, stage: str, exit_code: int) -> None:
        super().__init__(f"{stage} ended with exit code {exit_code}")
        self.stage = stage
        self.exit_code = exit_code


class Interrupted(Exception):  # noqa: N818 - not an error
    """Ctrl-C or SIGTERM, after what was running has saved and ended."""


def run_stage(stage: str, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
    """Print a command and run it to its end.

    Args:
        stage: what it is, for a message.
        command: program and words.
        env: its environment; this process's own by default.

    Raises:
        StageFailed: it ended with a code other than 0.
    """
    print_command(command)
    code = subprocess.run(command, env=env, check=False).returncode
    if code:
        raise StageFailed(stage, code if code > 0 else 128 - code)


def run_training(
    command: Sequence[str],
    *,
    run_dir: Path,
    stop_at: int | None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Print a training command and run it to its end, or stop it after some steps.

    It runs in a session of its own: Ctrl-C then reaches this program alone, which stops the ranks
    one way, instead of the launcher and every rank at once.

    Args:
        command: program and words, launcher included.
        run_dir: the run's folder, whose status.json is read.
        stop_at: step after which the ranks are told to stop; None lets them finish.
        env: environment.

    Raises:
        StageFailed: it failed; with the code of status.json, because launchers flatten codes.
        Interrupted: Ctrl-C or SIGTERM, once the ranks have saved and ended.
    """
    print_command(command)
    process = subprocess.Popen(command, env=env, start_new_session=True)
    told = False
    with _terminate_as_interrupt():
        try:
            while process.poll() is None:
                if stop_at is not None and not told and _step_of(run_dir, process) >= stop_at:
                    told = True
                    stop_ranks(process)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        except KeyboardInterrupt:
            _stop_and_wait(process)
            raise Interrupted from None
    status = read_status(run_dir)
    if process.returncode == 0 or (told and status.get("state") in ("preempted", "done")):
        return
    code = status.get("exit_code") if status.get("state") in ("failed", "preempted") else None
    raise StageFailed("training", code or abs(process.returncode))


def stop_ranks(process: subprocess.Popen[bytes]) -> None:
    """Tell the ranks of a deepspeed launcher to save and end.

    The outer launcher would go away without passing a signal on; the one below it passes SIGTERM to
    the ranks and waits for them.
    """
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGTERM)


def _stop_and_wait(process: subprocess.Popen[bytes]) -> None:
    """Stop a training and wait for it; a second Ctrl-C, or too long a wait, kills it."""
    sys.stderr.write("\nstopping: the ranks save first (Ctrl-C again ends them at once)\n")
    try:
        stop_ranks(process)
        process.wait(STOP_LIMIT_S)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _step_of(run_dir: Path, process: subprocess.Popen[bytes]) -> int:
    """Read the step of the run while it is this process's, not the last start's."""
    status = read_status(run_dir)
    if status.get("state") != "running":
        return 0
    return int(status.get("step", 0))


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C inside the block."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def deepspeed_command(recipe: str, settings: Sequence[str], *, ranks: int) -> list[str]:
    """Write the command that trains a recipe on this machine under the deepspeed launcher.

    Args:
        recipe: name of the recipe.
        settings: words after it.
        ranks: processes.

    Raises:
        ConfigError: the launcher is not installed beside this Python.
    """
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.exists():
        raise ConfigError(
            f"{launcher}: not there; install the project into this environment (make setup)"
        )
    # A fixed port would collide with another training on this machine.
    options = [
        "--log_level",
        "error",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        "--module",
    ]
    return [str(launcher), *options, "train.pretrain", recipe, *settings]


def environment(*, ranks: int, has_gpu: bool) -> dict[str, str]:
    """Give the environment for several ranks on one machine: cores shared out, launcher chatter
    left out.

    Args:
        ranks: processes.
        has_gpu: whether they compute on GPUs.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        # torch 2.13 announces renamed collectives on every rank; nothing in this project calls
        # them.
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if not has_gpu:
        defaults["DS_ACCELERATOR"] = "cpu"  # the launcher warns otherwise
    return {**defaults, **os.environ}


def free_port() -> int:
    """Find a TCP port that is free on the loopback interface now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def print_command(command: Sequence[str]) -> None:
    """Print a command as one would type it from the current folder."""
    program, here = command[0], f"{Path.cwd()}{os.sep}"
    shown = [program.removeprefix(here), *command[1:]]
    sys.stdout.write(f"$ {shlex.join(shown)}\n")
    sys.stdout.flush()
