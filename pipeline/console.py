"""What every command line here shares: how it starts, errors in one paragraph on stderr, exit
codes that say which kind, Ctrl-C, `--json`, and progress."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO, TypeVar

from pipeline.errors import MaelstromError
from pipeline.storage.uri import redact

EXIT_UNEXPECTED = 1
"""Exit code of an error that is a defect of the program; a traceback comes with it."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

_RESULT: ContextVar[TextIO | None] = ContextVar("stream of the result", default=None)
A = TypeVar("A")


# ------------------------------------------------------------------------------------------- output
def say(text: str) -> None:
    """Write a line for a person, to stderr: stdout is kept for what a program reads."""
    sys.stderr.write(f"{redact(text)}\n")
    sys.stderr.flush()


def say_json(data: dict[str, Any]) -> None:
    """Write one JSON object for a program, to stdout."""
    stream = _RESULT.get() or sys.stdout
    stream.write(
        json.dumps(
            data,
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )
    stream.flush()


@contextmanager
def _stdout_for_the_result() -> Iterator[None]:
    """Send to stderr whatever else would be written to stdout, by this process or its children.

    Libraries log to stdout (DeepSpeed does, from Python and from C++), so a program that reads
    `--json` would find their lines in front of the object.
    """
    # A test that has put something else in the place of stdout reads that: leave it alone.
    stdout = sys.stdout
    if stdout is not sys.__stdout__ or stdout is None or stdout.fileno() != 1:
        yield
        return
    stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as result:
        # The descriptor, not sys.stdout: libraries in C and child processes know only that.
        os.dup2(2, 1)
        token = _RESULT.set(result)
        try:
            yield
        finally:
            _RESULT.reset(token)
            stdout.flush()
            os.dup2(result.fileno(), 1)


# ------------------------------------------------------------------------------------------- Ctrl-C
class _EndAtOnce:
    """What Ctrl-C does while a command starts: one line, and the process ends.

    Not KeyboardInterrupt: raised inside the import of a C extension it comes out as an ImportError,
    or is printed as a traceback and lost. While modules are imported no file has been made that
    would have to be put away.
    """

    def __init__(self, command: str, *, speaks: bool) -> None:
        self._line = f"{command}: stopped before it began. Nothing was changed; run it again.\n"
        self._speaks = speaks

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._speaks:
            # Not sys.stderr: the interrupted code may be in the middle of writing to it.
            with suppress(OSError):
                os.write(2, self._line.encode())
        os._exit(EXIT_INTERRUPTED)


@contextmanager
def starting(command: str, *, speaks: bool = True) -> Iterator[None]:
    """Let Ctrl-C end the process in one line while the block imports what a command needs.

    Args:
        command: Name for the line, such as train.evaluate.
        speaks: Whether this process says it; of many ranks one does.
    """
    before = signal.getsignal(signal.SIGINT)
    # Anything else is somebody's choice: an ignored signal of `nohup`, or the handler of
    # start_command, which does the same.
    if before is not signal.default_int_handler or not _in_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _EndAtOnce(command, speaks=speaks))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_command(module: str, *, speaks: bool = True) -> NoReturn:
    """Import a command's module under its own name, run its `main` and end the process.

    Every door calls it before its own imports, which take up to seconds, so that Ctrl-C during
    them ends in one line too.

    Args:
        module: The door, such as pipeline.verify; its `main` takes no argument and returns the
            exit code.
        speaks: Whether this process reports Ctrl-C; of many ranks one does.
    """
    command = module.removesuffix(".__main__")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # It stays until run_command takes over: there is no moment without a handler.
        signal.signal(signal.SIGINT, _EndAtOnce(command, speaks=speaks))
    exit_code = importlib.import_module(module).main()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The result is out. KeyboardInterrupt inside an exit handler would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(exit_code)


def _interrupt_by_exception() -> None:
    """Give Ctrl-C back to Python: from here on there is work to be left in order."""
    if isinstance(signal.getsignal(signal.SIGINT), _EndAtOnce) and _in_main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# ---------------------------------------------------------------------------------------- the guard
def run_command(
    body: Callable[[A], int],
    arguments: type[A],
    args: Sequence[str] | None,
    *,
    module: str,
    interrupted: str,
) -> int:
    """Read a command line, run the command, and return its exit code.

    Args:
        body: The command; returns the exit code when all goes well.
        arguments: Dataclass of the command line. If it has a field `json` and that is given, stdout
            carries only what `say_json` writes.
        args: Words after the program's name. None: the process's own.
        module: What stands after `python -m`.
        interrupted: What to say after Ctrl-C: what is left, and what to do next.

    Raises:
        SystemExit: With 2 after a mistake on the command line, with 0 after `--help`.
    """

    def command() -> int:
        with starting(module):
            import tyro

            given = tyro.cli(
                arguments,
                args=args,
                prog=f"python -m {module}",
                # `--json` and no `--no-json` beside it.
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        if not getattr(given, "json", False):
            return body(given)
        with _stdout_for_the_result():
            return body(given)

    return guard(command, interrupted=interrupted)


def guard(
    command: Callable[[], int],
    *,
    interrupted: str,
    speaks: bool = True,
) -> int:
    """Run a command's body, report how it failed, and return its exit code.

    Args:
        command: Returns the exit code when all goes well.
        interrupted: What to say after Ctrl-C: what is left, and what to do next.
        speaks: Whether this process reports errors that all ranks meet alike.
    """
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format="%(message)s",
    )
    try:
        _interrupt_by_exception()
        return command()
    except MaelstromError as error:
        text, exit_code = f"error: {error}", error.exit_code
    except KeyboardInterrupt:
        text, exit_code = interrupted, EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001 - a defect: told in full, but without what must stay secret
        text, exit_code = traceback.format_exc().rstrip(), EXIT_UNEXPECTED
    if speaks:
        say(text)
    return exit_code


# ----------------------------------------------------------------------------------------- progress
_LINE_EVERY_S = 10.0


class Progress:
    """Shows how far a command is, how fast it goes and how long it will take. Use it as a context
    manager.

    Args:
        label: What is being done.
        total: Units in all.
        unit: What is counted, in the plural; bytes are shown as MB.
        after_s: Seconds without a word: what is done within them is not shown at all.
    """

    def __init__(
        self, label: str, *, total: int, unit: str = "images", after_s: float = 0.0
    ) -> None:
        self._label = label
        self._total = total
        self._unit, self._scale = (unit, 1) if unit != "bytes" else ("MB", 1_000_000)
        self._after_s = after_s
        self._done = 0
        self._bytes = 0
        self._skipped = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._start_s = time.monotonic()
        # Without a terminal the first line comes after _LINE_EVERY_S, and so does every other.
        self._said_s = self._start_s
        if sys.stderr.isatty() and not self._after_s:
            self._show_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._done and self._elapsed_s() >= self._after_s:
            self._say()

    def advance(self, count: int, *, size_bytes: int = 0) -> None:
        """Count units that are done, and the bytes they took."""
        self._done += count
        self._bytes += size_bytes
        if self._bar is None and sys.stderr.isatty() and self._elapsed_s() >= self._after_s:
            self._show_bar()
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done,
                done=f"{self._shown(self._done)}/{self._shown(self._total)}",
                speed=self._speed(),
            )
        elif time.monotonic() - self._said_s > _LINE_EVERY_S:
            self._say()

    def skip(self, count: int) -> None:
        """Count units that were done before this run, and do not count for its speed."""
        self._done += count
        self._skipped += count

    def _show_bar(self) -> None:
        from rich import progress as bars
        from rich.console import Console

        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TextColumn("{task.fields[done]}"),
            bars.TextColumn("{task.fields[speed]}"),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(
            self._label,
            total=self._total,
            done="",
            speed="",
        )

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start_s

    def _speed(self) -> str:
        elapsed_s = max(self._elapsed_s(), 1e-6)
        rate = (self._done - self._skipped) / self._scale / elapsed_s
        text = f"{rate:,.0f} {self._unit}/s"
        if not self._bytes:
            return text
        return f"{text}, {self._bytes / elapsed_s / 1e6:,.1f} MB/s"

    def _say(self) -> None:
        self._said_s = time.monotonic()
        elapsed_s = self._elapsed_s()
        ending = f"{elapsed_s:,.1f} s"
        if self._done < self._total:
            done_now = max(1, self._done - self._skipped)
            left_s = elapsed_s / done_now * (self._total - self._done)
            ending = f"{left_s:,.0f} s left"
        say(
            f"{self._label}: {self._shown(self._done)} of {self._shown(self._total)} {self._unit}, "
            f"{self._speed()}, {ending}"
        )

    def _shown(self, count: int) -> str:
        return f"{count // self._scale:,}"
