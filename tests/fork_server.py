"""A process that has imported torch and DeepSpeed once, and forks the programs that tests start.

Usage: fork_server.py SOCKET. Importing both takes seconds of CPU time a process, and the tests
start hundreds of ranks. A forked rank is a process like any other: it has its own number, ends with
its own code, can be stopped and killed. Only where the start of a process or a launcher is what is
tested does a test start them for real.

A request is one JSON object on a connection of its own, with two file descriptors for stdout and
stderr. The answers are the process's number and, once it has ended, its exit code, each on a line.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path

PRELOADED = (
    "torch",
    "torch._inductor.compile_fx",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "s3fs",
    "obstore",
    "train.engine.deepspeed_state",
    "train.evaluate",
    "train.export",
    "train.loop.loop",
    "train.pretrain",
    "train.reconstruct",
    "pipeline.convert.__main__",
    "pipeline.decoders.choose",
    "pipeline.decoders.turbo",
)
REQUEST_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Request:
    """A program to run.

    Attributes:
        words: `-m MODULE WORD ...`, `-c CODE WORD ...` or `SCRIPT WORD ...`.
        env: its whole environment.
        cwd: its folder.
    """

    words: list[str]
    env: dict[str, str]
    cwd: str


def serve(path: str) -> Request:
    """Fork a process for each request until the last client is gone. Returns in the forked
    processes only."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{path}.new")
    listener.listen(64)
    # Under its name it can be connected to.
    Path(f"{path}.new").rename(path)
    parent = os.getppid()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while os.getppid() == parent:  # not an orphan
            for key, _ in selector.select(1.0):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    request = _fork(connection, selector)
                    if request is not None:
                        # The child: nothing of the server may stay open in it.
                        selector.close()
                        listener.close()
                        return request
                else:
                    _report(key, selector)
    sys.exit(0)


def _fork(
    connection: socket.socket, selector: selectors.BaseSelector
) -> Request | None:
    """Fork for the request on a connection; None in the server."""
    text, ancillary, _, _ = connection.recvmsg(REQUEST_BYTES, socket.CMSG_LEN(2 * 4))
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    request = Request(**json.loads(text))
    child = os.fork()
    if child:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(f"{child}\n".encode())
        # Readable once the child has ended.
        selector.register(
            os.pidfd_open(child), selectors.EVENT_READ, (child, connection)
        )
        return None
    for key in list(selector.get_map().values()):
        if isinstance(key.fileobj, int):
            os.close(key.fileobj)
            key.data[1].close()
    connection.close()
    for target, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, target)
        os.close(descriptor)
    return request


def _report(key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
    """Tell the client of a process that has ended."""
    child, connection = key.data
    _, status = os.waitpid(child, 0)
    selector.unregister(key.fileobj)
    os.close(key.fd)
    with contextlib.suppress(OSError), connection:  # the client may have lost interest
        connection.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run(request: Request) -> None:
    """Become the program, as `python` with these words would."""
    os.environ.clear()
    os.environ.update(request.env)
    os.chdir(request.cwd)
    words = request.words
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    # Ctrl-C goes to every process of the terminal; pytest ends this one itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    # What lies still is not copied when a child's collector walks over it.
    gc.collect()
    gc.freeze()
    request = serve(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(request)


if __name__ == "__main__":
    main()
