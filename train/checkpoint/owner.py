"""One run a folder of checkpoints: a record of who writes there, on disk and in object storage.

    owner-000001.json    the first owner, then those that took the folder over after it

The record with the highest number counts. Taking the folder is a conditional write of the next
number, so that of two starts only one succeeds; an owner only ever rewrites its own record, to show
that it is alive. An owner that was silent for too long may be replaced: it sees the higher number
before its next commit, and writes and deletes no more.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType

from pipeline import storage
from pipeline.errors import ConfigError, DataError, InfrastructureError, MaelstromError
from train.errors import CheckpointError
from train.process.liveness import Identity, is_alive, this_process
from train.process.world import World

BEAT_S = 10.0
"""How often the owner writes its record anew."""
STALE_S = 60.0
"""An owner on another machine whose record did not change for so long is taken to be gone: six
beats. A restart after a crash there waits as long."""
_LOOK_S = 0.5
_JOIN_S = 5.0
_NAME = re.compile(r"owner-(\d{6,})\.json")
_Verdict = tuple[str, str]
"""What a look at the folder gave: `taken`, `wait` or the name of an error, and its message."""
_ERRORS: Mapping[str, type[MaelstromError]] = MappingProxyType(
    {
        "busy": ConfigError,
        "unwritable": CheckpointError,
        "infrastructure": InfrastructureError,
    }
)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who writes into a folder of checkpoints.

    Args:
        state: `holds`, or `released` once the job has ended in an orderly way.
        process: of rank 0.
        run_dir: its run folder.
        command: its command line.
        token: unique to this job.
        beat: number that grows while the job is alive; no clock of another machine is compared.
    """

    state: str
    process: Identity
    run_dir: str
    command: str
    token: str
    beat: int = 0


class CheckpointOwner:
    """Owns a folder of checkpoints from `take` until the context ends. Every rank makes one and
    calls every method together with the others; rank 0 writes.

    Args:
        uri: the folder of checkpoints.
        run_dir: folder of the run, for the message to others.
        world: the processes of the run.
        beat_s: seconds between two signs of life.
        stale_s: seconds of silence after which another machine's owner is taken to be gone.
        say: told what a start waits for; stdout by default, for no reporter is open yet.
    """

    def __init__(
        self,
        uri: str,
        *,
        run_dir: Path,
        world: World,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.uri = uri
        self._world = world
        self._beat_s = beat_s
        self._stale_s = stale_s
        self._say = say or _say_on_stdout
        self._number = 0
        self._watched: Owner | None = None
        self._watched_since = 0.0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._own = Owner(
            state="holds",
            process=this_process(),
            run_dir=str(run_dir.absolute()),
            command=storage.redact(" ".join(sys.argv))[:200],
            token=uuid.uuid4().hex,
        )

    def __enter__(self) -> CheckpointOwner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the folder, if it was taken and is still owned."""
        if self._thread is None:
            return
        self._closing.set()
        # Storage that does not answer must not hold up the end of the program.
        self._thread.join(_JOIN_S)
        # Failing here would hide how the run ended; without a release the owner goes stale.
        with suppress(MaelstromError, OSError):
            if self.problem() is None:
                self._write(replace(self._own, state="released"))

    def take(self) -> None:
        """Become the owner; waits for an owner on another machine to show whether it is alive.

        Raises:
            ConfigError: on every rank: another job that is alive owns the folder.
            CheckpointError: on every rank: the folder cannot be written to.
            InfrastructureError: on every rank: the storage does not answer.
        """
        while True:
            verdict: _Verdict = ("wait", "")
            if self._world.is_main:
                verdict = self._look()
            # One agreement per look: the other ranks must not wait for as long as all looks take.
            kind, text = self._world.broadcast(verdict)
            if kind == "taken":
                break
            if kind != "wait":
                raise _ERRORS[kind](text)
            time.sleep(_LOOK_S)
        if self._world.is_main:
            self._thread = threading.Thread(
                target=self._show_life, name="owner", daemon=True
            )
            self._thread.start()

    def problem(self) -> str | None:
        """Say who has taken the folder over from this job; None if nobody has. For rank 0.

        Raises:
            MaelstromError: the storage does not answer.
        """
        numbers = _list_records(self.uri)
        # Its own record may be gone: whoever takes the folder removes those with lower numbers.
        newest = max(numbers, default=0)
        if newest <= self._number:
            return None
        other = _read(self.uri, newest)
        return (
            f"checkpoint.dir {storage.redact(self.uri)} was taken over by {_describe(other)}, "
            "because this job gave no sign of life for too long. This job writes and deletes no "
            "checkpoint any more; earlier ones are as they were."
        )

    # --------------------------------------------------------------------------------------- taking

    def _look(self) -> _Verdict:
        """Take the folder if it is free, or say why not."""
        try:
            return self._try_to_take()
        except InfrastructureError as error:
            return "infrastructure", str(error)
        except MaelstromError as error:
            folder = storage.redact(self.uri)
            return "unwritable", f"checkpoint.dir {folder} cannot be used: {error}"

    def _try_to_take(self) -> _Verdict:
        numbers = _list_records(self.uri)
        newest = max(numbers, default=0)
        other = _read(self.uri, newest) if newest else None
        if other is not None and not self._is_free(other):
            if self._is_alive(other):
                return "busy", self._refusal(other)
            return "wait", ""

        if not storage.put_if_absent(
            _record_uri(self.uri, newest + 1), _render(self._own)
        ):
            # Another start was faster; the next look finds its record.
            return "wait", ""
        self._number = newest + 1
        for number in numbers:
            # They are kept by nobody: the one with the highest number counts.
            with suppress(MaelstromError):
                storage.delete(_record_uri(self.uri, number))
        return "taken", ""

    def _is_free(self, other: Owner) -> bool:
        """Tell whether an owner has released the folder, is gone, or was silent for too long."""
        if other.state == "released":
            return True
        # Only a definite no: an owner that cannot be looked up is watched instead.
        if is_alive(other.process) is False:
            return True
        return (
            other == self._watched
            and time.monotonic() - self._watched_since > self._stale_s
        )

    def _is_alive(self, other: Owner) -> bool:
        """Tell whether an owner that may be alive is known to be so: its process is there, or its
        record changed while this start was looking."""
        if is_alive(other.process):
            return True
        # Any change counts: a higher beat, or the record of a job that came in between.
        before = self._watched
        if other != before:
            self._watched = other
            self._watched_since = time.monotonic()
        if before is None:
            folder = storage.redact(self.uri)
            self._say(
                f"checkpoint.dir {folder} belongs to {_describe(other)}; waiting up to "
                f"{self._stale_s:g} s for a sign of life from there"
            )
        return before is not None and other != before

    def _refusal(self, other: Owner) -> str:
        return (
            f"checkpoint.dir {storage.redact(self.uri)} belongs to {_describe(other)}, which is "
            "alive. Stop it first, or give another checkpoint.dir."
        )

    def _show_life(self) -> None:
        while not self._closing.wait(self._beat_s):
            # Storage that fails now may work at the next beat.
            with suppress(MaelstromError, OSError):
                if self.problem() is not None:
                    return
                self._own = replace(self._own, beat=self._own.beat + 1)
                self._write(self._own)

    def _write(self, own: Owner) -> None:
        storage.write_atomic(_record_uri(self.uri, self._number), _render(own))


def _say_on_stdout(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------ records
def _record_uri(folder: str, number: int) -> str:
    return storage.join(folder, f"owner-{number:06d}.json")


def _render(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=1) + "\n").encode()


def _list_records(folder: str) -> list[int]:
    if not storage.exists(folder):
        return []
    matches = (_NAME.fullmatch(file.name) for file in storage.list_files(folder))
    return [int(match.group(1)) for match in matches if match]


def _read(folder: str, number: int) -> Owner:
    """Read a record. One that is damaged, or half-written on a file system without hard links,
    stands for an owner that cannot be looked up."""
    try:
        content = json.loads(storage.read_bytes(_record_uri(folder, number)))
        return Owner(**{**content, "process": Identity(**content["process"])})
    except (DataError, ValueError, TypeError, KeyError):
        unknown = Identity("an unknown machine", "", "", 0, 0.0)
        return Owner("holds", unknown, "unknown", "", f"record {number}")


def _describe(owner: Owner) -> str:
    process = owner.process
    command = owner.command or "unknown command"
    return (
        f"process {process.pid} on {process.host} (run.dir {owner.run_dir}; {command})"
    )
