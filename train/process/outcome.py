"""How a run ends: status.json, one message for people however many ranks fail, and the exit code.
Imports no torch.

Launchers flatten exit codes (torchrun gives 1 for everything); status.json keeps them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline import storage
from pipeline.console import EXIT_INTERRUPTED, EXIT_UNEXPECTED
from pipeline.errors import InfrastructureError, MaelstromError
from pipeline.storage import redact
from train.errors import Preempted
from train.process.lease import FolderInUseError, is_held_by_another
from train.process.liveness import now_text, this_process
from train.process.place import name_start, rank_of

RunState = Literal["running", "done", "failed", "preempted"]
STATUS_FILE = "status.json"
INTERRUPTED = "stopped before training began. The same command starts again."
LOCK_WAIT_S = 10.0


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file so that a reader sees the old one or the new one, never half of it.

    Args:
        path: local file; its folder is made.
        content: what to write.

    Raises:
        InfrastructureError: the disk is full, or the folder may not be written.
    """
    text = json.dumps(content, indent=1) + "\n"
    try:
        storage.write_atomic(str(path), text.encode())
    except MaelstromError as error:
        raise InfrastructureError(
            f"{path}: cannot be written: {error}; free some space or give another folder with "
            "--run.dir"
        ) from error


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
        self.launch = name_start(os.environ, parent_pid=os.getppid())
        """Name of this start of the program, equal on the ranks of one node."""
        self._process = this_process()
        # Between the loop, which writes, and the thread that says that the run is alive.
        self._writing = threading.Lock()

    def write(
        self, state: RunState, *, exit_code: int | None, reason: str = "", **more: Any
    ) -> None:
        """Write status.json.

        Args:
            state: running, done, failed or preempted.
            exit_code: what the command ends with; None while it runs.
            reason: one line for people; empty if there is no more to say.
            more: further keys.
        """
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
        with suppress(OSError, InfrastructureError, Timeout), self._writing, self._file_lock():
            known = read_status(self.run_dir)
            # Another rank may have written how the run ended, which stays.
            is_ours = known.get("launch") == self.launch
            if is_ours and known.get("exit_code") is None:
                known["step"] = self.step
                known["heartbeat"] = now_text()
                write_json(self.run_dir / STATUS_FILE, known)

    def _file_lock(self) -> FileLock:
        return FileLock(self.run_dir / f".{STATUS_FILE}.lock", timeout=LOCK_WAIT_S)

    def conclude(self, error: BaseException) -> int:
        """Report an error once and say which code to end with.

        The first rank of a node that fails writes status.json and the message. The others fail
        because of it (their connection is closed), find its report, and end silently with its code.

        Args:
            error: what ended the run.

        Returns:
            The exit code.
        """
        code = exit_code_of(error)
        is_refused = isinstance(error, FolderInUseError)
        if is_refused or is_held_by_another(self.run_dir, launch=self.launch):
            # The status here is that of a job which goes on; this start must not touch it.
            if self.rank == 0:
                sys.stderr.write(describe(error))
            return code
        state: RunState = "preempted" if isinstance(error, Preempted) else "failed"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            # The ranks of a node fail within milliseconds; only the first knows the reason.
            with self._file_lock():
                known = read_status(self.run_dir)
                if known.get("launch") == self.launch and known.get("exit_code") is not None:
                    return int(known["exit_code"])
                self.write(
                    state,
                    exit_code=code,
                    reason=_reason(error),
                    rank=self.rank,
                )
        except (OSError, InfrastructureError) as trouble:
            sys.stderr.write(
                f"warning: {self.run_dir / STATUS_FILE} could not be written: {trouble}\n"
            )
        sys.stderr.write(describe(error))
        sys.stderr.flush()
        return code


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
