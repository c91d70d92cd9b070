"""stdout and stderr that no command fails for: whoever reads them may go away, the disk behind
them may fill up, and they may be closed from the start.

A conversion or a training run takes hours; it must not end because a terminal was closed. So a
write that fails is not an error here: the text is dropped and the loss is noted. Only a result that
was asked for on stdout, and did not get there, becomes an error, once the work is done.
"""

from __future__ import annotations

import errno
import io
import json
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TextIO, cast

from pipeline.errors import InfrastructureError
from pipeline.storage.uri import redact

_RESULT: ContextVar[TextIO | None] = ContextVar("stream of the result", default=None)
_READER_LEFT = (errno.EPIPE, errno.EBADF, errno.EIO)
"""Failures that mean that nobody wants the text: the pipe's reader is gone, the stream was closed
before the start, the terminal was hung up. All others, such as a full disk, are a loss."""
_WAIT_MS = 1000


# ---------------------------------------------------------------------------------------- streams
class _Tolerant(io.FileIO):
    """A descriptor whose writes never raise.

    It stands below the buffer and the text layer, so that all who write (print, logging, rich,
    tyro, the interpreter at its end) are spared alike.

    Args:
        descriptor: 1 or 2, or a copy of one; it is not closed.
        trouble: Why all that is written is lost, if that is known from the start.
    """

    def __init__(self, descriptor: int, *, trouble: OSError | None = None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.trouble = trouble

    def write(self, data: Any, /) -> int:
        """Write all of the data, or note why it is lost; the caller is always told that all is
        written."""
        left = memoryview(data).cast("B")
        num_bytes = len(left)
        while left:
            try:
                written = super().write(left)
            except OSError as error:
                # The next write tries again: a disk may have room by then.
                self.trouble = error
                break
            if written is None:
                # A terminal or pipe that another program has set to non-blocking, and that is full.
                _wait_until_writable(self.fileno())
                continue
            left = left[written:]
        return num_bytes


def _wait_until_writable(descriptor: int) -> None:
    waiting = select.poll()
    waiting.register(descriptor, select.POLLOUT)
    waiting.poll(_WAIT_MS)


def outlive_readers() -> None:
    """Replace this process's streams by ones that never raise; call it before anything is written.

    Streams that were closed (`2>&-`) are opened on /dev/null: the next file that is opened would
    otherwise get their number, and a library that writes to descriptor 2 would write into it.
    """
    closed = _fill_closed_descriptors()
    if sys.stdin is None and 0 in closed:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        # A test that has put something else in its place reads that: leave it alone.
        if stream is not getattr(sys, f"__{name}__"):
            continue
        trouble = (
            OSError(errno.EBADF, f"{name} is closed") if descriptor in closed else None
        )
        tolerant = _wrap(descriptor, like=stream, trouble=trouble)
        setattr(sys, name, tolerant)
        # Some write to the one the interpreter started with.
        setattr(sys, f"__{name}__", tolerant)


def _fill_closed_descriptors() -> list[int]:
    """Open /dev/null on each standard descriptor that is closed, and return their numbers."""
    closed = []
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            # Child processes take over what they find at 0, 1 and 2.
            os.set_inheritable(descriptor, True)
            closed.append(descriptor)
    return closed


def _wrap(descriptor: int, *, like: Any, trouble: OSError | None) -> TextIO:
    raw = _Tolerant(descriptor, trouble=trouble)
    if like is not None:
        # What was written before stays in front.
        with suppress(OSError, ValueError):
            like.flush()
    # `python -u`, as torchrun starts ranks, has no buffer between text and descriptor.
    unbuffered = bool(getattr(like, "write_through", False))
    below = raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        cast(Any, below),
        encoding=getattr(like, "encoding", None) or "utf-8",
        # A file name that is not valid UTF-8 must not end a command.
        errors="backslashreplace",
        line_buffering=bool(getattr(like, "line_buffering", descriptor == 2)),
        write_through=unbuffered,
    )


def _trouble_of(stream: Any) -> OSError | None:
    """Return why text was lost on a stream; None if none was, or it is not one of ours."""
    below = getattr(stream, "buffer", None)
    raw = getattr(below, "raw", below)
    return raw.trouble if isinstance(raw, _Tolerant) else None


# --------------------------------------------------------------------------------------- writing
def say(text: str) -> None:
    """Write a line for a person, to stderr: stdout is kept for what a program reads."""
    write_to(sys.stderr, f"{redact(text)}\n")


def write_to(stream: TextIO | None, text: str) -> None:
    """Write text and flush it; what cannot be written is dropped, whatever kind of stream it is."""
    if stream is None:
        return
    with suppress(OSError, ValueError):
        stream.write(text)
        stream.flush()


def say_result(text: str) -> None:
    """Write a command's result for a person, to stdout.

    If it is lost, `guard` says so, unless its reader has left as that of `| head` does.
    """
    _note_result(_RESULT.get() or sys.stdout, text, is_json=False)


def say_json(data: dict[str, Any]) -> None:
    """Write one JSON object for a program, to stdout; if it is lost, `guard` says so."""
    text = json.dumps(
        data,
        indent=1,
        ensure_ascii=False,
    )
    _note_result(_RESULT.get() or sys.stdout, f"{text}\n", is_json=True)


_LOST: ContextVar[str] = ContextVar("why the result is lost", default="")


def _note_result(stream: TextIO | None, text: str, *, is_json: bool) -> None:
    trouble: BaseException | None = None
    if stream is None:
        trouble = OSError(errno.EBADF, "stdout is closed")
    else:
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError) as error:
            trouble = error
        trouble = trouble or _trouble_of(stream)
    if trouble is None:
        return
    left = isinstance(trouble, OSError) and trouble.errno in _READER_LEFT
    if is_json or not left:
        why = trouble.strerror if isinstance(trouble, OSError) else str(trouble)
        _LOST.set(why or type(trouble).__name__)


def refuse_lost_result() -> None:
    """Raise if the result did not reach stdout.

    Raises:
        InfrastructureError: It is lost, in whole or in part.
    """
    why = _LOST.get()
    _LOST.set("")
    if why:
        raise InfrastructureError(
            f"the result could not be written to stdout ({why}). The work itself is done: run the "
            "same command again with stdout to a file on a disk with room, or to a program that "
            "reads all of it."
        )


@contextmanager
def stdout_for_the_result() -> Iterator[None]:
    """Send to stderr whatever else would be written to stdout, by this process or its children.

    Libraries log to stdout (DeepSpeed does, from Python and from C++), so a program that reads
    `--json` would find their lines in front of the object.
    """
    # A test that has put something else in the place of stdout reads that: leave it alone.
    stdout = sys.stdout
    if stdout is not sys.__stdout__ or stdout is None or stdout.fileno() != 1:
        yield
        return
    with suppress(OSError):
        stdout.flush()
    copy = os.dup(1)
    result = _wrap(copy, like=None, trouble=_trouble_of(stdout))
    # The descriptor, not sys.stdout: libraries in C and child processes know only that.
    os.dup2(2, 1)
    token = _RESULT.set(result)
    try:
        yield
    finally:
        _RESULT.reset(token)
        with suppress(OSError):
            stdout.flush()
        os.dup2(copy, 1)
        result.close()
        os.close(copy)
