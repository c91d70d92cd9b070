"""How every command starts, what Ctrl-C does to it, and how it reports the way it ended."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from pipeline.console.streams import (
    outlive_readers,
    refuse_lost_result,
    say,
    stdout_for_the_result,
)
from pipeline.console.surplus import refuse_surplus
from pipeline.errors import ConfigError, InfrastructureError, MaelstromError
from pipeline.storage.retry import TOO_MANY_FILES, has_too_many_files

EXIT_UNEXPECTED = 1
"""Exit code of an error that is a defect of the program; a traceback comes with it."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

A = TypeVar("A")


# ------------------------------------------------------------------------------------------- Ctrl-C
class _EndAtOnce:
    """What Ctrl-C does while a command starts: one line, and the process ends.

    Not KeyboardInterrupt: raised inside the import of a C extension it comes out as an ImportError,
    or is printed as a traceback and lost. While modules are imported no file has been made that
    would have to be put away.
    """

    def __init__(self, command: str, *, speaks: bool) -> None:
        self._line = (
            f"{command}: stopped before it began. Nothing was changed; run it again.\n"
        )
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
    # Before the imports, which may keep sys.stderr (logging does) or open files.
    outlive_readers()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # It stays until run_command takes over: there is no moment without a handler.
        signal.signal(signal.SIGINT, _EndAtOnce(command, speaks=speaks))
    _refuse_shadows(module)
    try:
        exit_code = importlib.import_module(module).main()
    except (OSError, ImportError) as error:
        # Of files and libraries that an import opens; `guard` sees those of the work itself.
        if not has_too_many_files(error):
            raise
        say(f"error: {TOO_MANY_FILES}")
        exit_code = InfrastructureError.exit_code
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The result is out. KeyboardInterrupt inside an exit handler would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(exit_code)


def _refuse_shadows(module: str) -> None:
    """Stop if a file of the working folder, such as `model.py`, would be imported in place of our
    package: with `-m` Python looks there first.

    Found, not imported: a stranger's file would be run. A `train.py` or `pipeline.py` hides the
    command itself, and Python says so before any of our lines is run.

    Args:
        module: The door.
    """
    ours = Path(__file__).resolve().parents[2]
    # pipeline imports none of the other packages, so they hide nothing from its commands.
    needed = ("model", "train") if module.startswith("train.") else ()
    for name in needed:
        spec = importlib.util.find_spec(name)
        expected = ours / name / "__init__.py"
        if spec is not None and spec.origin and Path(spec.origin).resolve() != expected:
            say(
                f"error: {spec.origin} hides our package {name} from {module}: rename it, or start "
                "in another folder"
            )
            sys.exit(ConfigError.exit_code)


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

            refuse_surplus(arguments, args)
            given = tyro.cli(
                arguments,
                args=args,
                prog=f"python -m {module}",
                # `--json` and no `--no-json` beside it.
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            from pipeline.options import check_arguments

            given = check_arguments(given)
        if not getattr(given, "json", False):
            return body(given)
        with stdout_for_the_result():
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
        exit_code = command()
        # The code of the work goes first: a check that has found problems says 3, read or not.
        if exit_code == 0:
            refuse_lost_result()
        return exit_code
    except MaelstromError as error:
        text, exit_code = f"error: {error}", error.exit_code
    except KeyboardInterrupt:
        text, exit_code = interrupted, EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - a defect: told in full, but without what must stay secret
        text, exit_code = traceback.format_exc().rstrip(), EXIT_UNEXPECTED
        # Not a defect, and met anywhere: in a listing, a library, a socket.
        if has_too_many_files(error):
            text, exit_code = f"error: {TOO_MANY_FILES}", InfrastructureError.exit_code
    if speaks:
        say(text)
    return exit_code
