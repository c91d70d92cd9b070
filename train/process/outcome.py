"""How a run ends: status.json, one message for people however many ranks fail, and the exit code.
Imports no torch.

Launchers flatten exit codes (torchrun gives 1 for everything); status.json keeps them.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline import storage
from pipeline.console import EXIT_INTERRUPTED, EXIT_UNEXPECTED, say
from pipeline.errors import InfrastructureError, MaelstromError
from pipeline.storage import redact
from train.errors import Preempted
from train.process.folder import cannot_write
from train.process.lease import FolderInUseError, is_held_by_another
from train.process.liveness import now_text, this_process
from train.process.place import name_start, rank_of, world_size_of
from train.process.roll import Roll, is_consequence, name_cause

RunState = Literal["running", "done", "failed", "preempted", "interrupted"]
STATUS_FILE = "status.json"
INTERRUPTED = "stopped before training began. The same command starts again."
LOCK_WAIT_S = 10.0
CAUSE_WAIT_S = 10.0
"""How long a rank that lost contact waits for the cause: the rank that failed is still writing its
report, or is not yet gone from the list of processes. Launchers kill the rest after 30 s."""
REFUSAL_WAIT_S = 3.0
"""How long another rank waits for rank 0 to report a mistake in the settings."""
_LOOK_S = 0.05


def write_json(
    path: Path, content: Mapping[str, Any], *, option: str = "--run.dir"
) -> None:
    """Write a small JSON file so that a reader sees the old one or the new one, never half of it.

    Args:
        path: local file; its folder is made.
        content: what to write.
        option: what names another place, for the message.

    Raises:
        InfrastructureError: the disk is full, or the folder may not be written.
    """
    text = json.dumps(content, indent=1) + "\n"
    try:
        storage.write_atomic(str(path), text.encode())
    except MaelstromError as error:
        raise InfrastructureError(cannot_write(path, error, setting=option)) from error


def read_status(run_dir: Path) -> dict[str, Any]:
    """Read a run's status.json; empty if there is none yet."""
    try:
        text = (run_dir / STATUS_FILE).read_text(encoding="utf-8")
        status: dict[str, Any] = json.loads(text)
    except (OSError, json.JSONDecodeError):
        return {}
    return status


class Outcome:
    """The status of one run folder, as written by one rank of one start of the program.

    Made before anything can fail: it notes which start this is from the launcher's environment.

    Args:
        run_dir: local folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.rank = rank_of(os.environ)
        self.step = 0
        """Optimizer steps done, kept up to date by the loop."""
        self.began = False
        """Whether the loop's own handlers of signals are in place."""
        self.warn: Callable[[str], None] = say
        """Told once that status.json cannot be written while the run goes on."""
        self.launch = name_start(os.environ, parent_pid=os.getppid())
        """Name of this start of the program, equal on the ranks of one node."""
        self._process = this_process()
        # Between the loop, which writes, and the thread that says that the run is alive.
        self._writing = threading.Lock()
        self.roll = Roll(
            self.launch, rank=self.rank, world_size=world_size_of(os.environ)
        )
        self._has_warned = False
        # The main thread, the watchdog and a signal's handler may all come to the end.
        self._concluding = threading.RLock()

    def write(
        self, state: RunState, *, exit_code: int | None, reason: str = "", **more: Any
    ) -> None:
        """Write status.json. While the run goes on, failing to is told once and no more: a full
        disk must not end a run whose checkpoints have room.

        Args:
            state: running, done, failed, preempted or interrupted.
            exit_code: what the command ends with; None while it runs.
            reason: one line for people; empty if there is no more to say.
            more: further keys.
        """
        try:
            self._write(state, exit_code=exit_code, reason=reason, **more)
        except InfrastructureError as error:
            if not self._has_warned:
                self.warn(f"warning: {error}; training goes on without it")
            self._has_warned = True

    def _write(
        self, state: RunState, *, exit_code: int | None, reason: str = "", **more: Any
    ) -> None:
        content = {
            "state": state,
            "exit_code": exit_code,
            "step": self.step,
            "reason": reason,
            "updated": now_text(),
            "heartbeat": now_text(),
            **more,
            # Last: they are for programs, not for people.
            "process": self._process.to_json(),
            "launch": self.launch,
        }
        with self._writing:
            write_json(self.run_dir / STATUS_FILE, content)

    def beat(self) -> None:
        """Write down that this run is alive, for readers on other machines; see
        `liveness.judge_status`. Never raises: a full disk must not end a run."""
        with (
            suppress(OSError, InfrastructureError, Timeout),
            self._writing,
            self._file_lock(),
        ):
            known = read_status(self.run_dir)
            # Another rank may have written how the run ended, which stays.
            is_ours = known.get("launch") == self.launch
            if is_ours and known.get("exit_code") is None:
                known["step"] = self.step
                known["heartbeat"] = now_text()
                write_json(self.run_dir / STATUS_FILE, known)

    def _file_lock(self) -> FileLock:
        return FileLock(self.run_dir / f".{STATUS_FILE}.lock", timeout=LOCK_WAIT_S)

    def finish(self) -> None:
        """Say that the run is done."""
        if self.rank == 0:
            self.write("done", exit_code=0)
        self.roll.leave()

    def conclude(self, error: BaseException) -> int:
        """Report an error once and say which code to end with.

        The first rank of a node that fails writes status.json and the message. The others fail
        because of it (their connection is closed), find its report, and end silently with its code.
        A rank that was killed reports nothing: one that noticed finds out which one it was.

        Args:
            error: what ended the run.

        Returns:
            The exit code.
        """
        with self._concluding:
            error = self._wait_for_cause(error)
            with self.roll.locked():
                code = self._reported()
                if code is None:
                    code = exit_code_of(error)
                    self._report(error, code)
            self.roll.leave()
        return code

    def refuse(self, error: MaelstromError) -> int:
        """Report an error that every rank meets alike before anything was started: rank 0 says it.

        Args:
            error: e.g. mistakes in the settings.

        Returns:
            The exit code.
        """
        # It has taken no step, and those of an earlier start are not undone.
        self.step = int(read_status(self.run_dir).get("step") or 0)
        # A launcher ends the other ranks once one has failed: rank 0 must have spoken by then.
        deadline_s = time.monotonic() + REFUSAL_WAIT_S
        while (
            self.rank != 0
            and self.roll.verdict() is None
            and time.monotonic() < deadline_s
        ):
            time.sleep(_LOOK_S)
        with self.roll.locked():
            # Rank 0 says it even if another one was faster, and wrote the status.
            if self.rank == 0 or self._reported() is None:
                # Without the empty line that ends a progress display.
                if self.rank == 0:
                    _speak(describe(error).strip())
                self._report(error, error.exit_code, speaks=False)
        self.roll.leave()
        return error.exit_code

    def _wait_for_cause(self, error: BaseException) -> BaseException:
        """Give the error that names what happened, in place of one that only noticed it."""
        if not is_consequence(error, self.roll):
            return error
        deadline_s = time.monotonic() + CAUSE_WAIT_S
        # A rank that failed has reported before it closed its connections, or is about to.
        while self._reported() is None and time.monotonic() < deadline_s:
            if self.roll.gone() or self.roll.stopped():
                break
            time.sleep(_LOOK_S)
        return name_cause(error, self.roll, rank=self.rank)

    def _reported(self) -> int | None:
        """Give the exit code that another rank of this start has reported."""
        code = self.roll.verdict()
        if code is not None:
            return code
        known = read_status(self.run_dir)
        if known.get("launch") == self.launch and known.get("exit_code") is not None:
            return int(known["exit_code"])
        return None

    def _report(self, error: BaseException, code: int, *, speaks: bool = True) -> None:
        state: RunState = "failed"
        if isinstance(error, Preempted):
            state = "preempted"
        elif isinstance(error, KeyboardInterrupt):
            state = "interrupted"
        # First: whatever fails below, the other ranks shall not say it again.
        self.roll.decide(code)
        if speaks:
            _speak(describe(error).rstrip())
        is_refused = isinstance(error, FolderInUseError)
        if is_refused or is_held_by_another(self.run_dir, launch=self.launch):
            # The status here is that of a job which goes on; this start must not touch it.
            return
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with self._file_lock():
                self._write(
                    state, exit_code=code, reason=_reason(error), rank=self.rank
                )
        except (OSError, InfrastructureError, Timeout) as trouble:
            # An error about this very folder has said so already.
            if str(self.run_dir) not in str(error):
                self.warn(f"warning: {trouble}")


def _speak(text: str) -> None:
    try:
        say(text)
    except RuntimeError:
        # A signal's handler may have interrupted a write to the same stream.
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def exit_code_of(error: BaseException) -> int:
    """Give the code that a command ends with after an error."""
    if isinstance(error, MaelstromError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_UNEXPECTED


def describe(error: BaseException) -> str:
    """Put an error into words: its message if it is meant for the user, else the traceback; without
    what must stay secret."""
    if isinstance(error, Preempted):
        return redact(f"\n{error}\n")
    if isinstance(error, MaelstromError):
        return redact(f"\nerror: {error}\n")
    if isinstance(error, KeyboardInterrupt):
        return f"\n{INTERRUPTED}\n"
    return redact("".join(traceback.format_exception(error)))


def _reason(error: BaseException) -> str:
    """Give the one line of status.json."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return redact(str(error)) or type(error).__name__
