"""How the ranks of a run find each other, and what is said if they do not.

Every wait is in Python and in small pieces: a signal is heard at once, and a rank that died
meanwhile is named instead of waited for.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from pipeline.errors import InfrastructureError
from train.process.place import RankPlace
from train.process.roll import Roll, describe_stopped, rank_died

RESOLVE_LIMIT_S = 60.0
"""How long a host's name may be unknown: in a cluster it may appear after the ranks have started,
but a misspelt one never does."""
_ANSWER_LIMIT_S = 5.0
_LOOK_S = 0.2
_COUNT = "arrived"


def meet(place: RankPlace, *, timeout_s: float, roll: Roll | None = None) -> Store:
    """Wait until every rank of the run is here.

    Args:
        place: this process.
        timeout_s: longest wait for the others.
        roll: the ranks of this node.

    Returns:
        A store that all of them share.

    Raises:
        InfrastructureError: the port is taken, the host is unknown or does not answer, or a rank
            died or did not come.
    """
    roll = roll or Roll("", rank=place.rank, world_size=1)
    deadline_s = time.monotonic() + timeout_s
    # torchrun's agent serves the store itself; under other launchers rank 0 does.
    serves = (
        place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    )
    _resolve(place, deadline_s=deadline_s)
    if not serves:
        _wait_for_server(place, deadline_s=deadline_s, roll=roll)
    store = PrefixStore(
        _prefix(), _open_store(place, serves=serves, timeout_s=timeout_s, roll=roll)
    )
    _wait_for_ranks(store, place, timeout_s=timeout_s, roll=roll)
    return store


def _prefix() -> str:
    # A restart by torchrun meets at the same store, which still holds the names of the last time.
    return f"maelstrom/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _resolve(place: RankPlace, *, deadline_s: float) -> None:
    limit_s = min(deadline_s, time.monotonic() + RESOLVE_LIMIT_S)
    while True:
        try:
            socket.getaddrinfo(
                place.master_addr, place.master_port, type=socket.SOCK_STREAM
            )
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() > limit_s:
                raise InfrastructureError(
                    f"rank {place.rank}: the host {place.master_addr!r} of rank 0 is not known "
                    f"here ({error}). Check MASTER_ADDR or the launcher's --master_addr, and this "
                    "node's name resolution."
                ) from error
        else:
            return
        time.sleep(_LOOK_S)


def _wait_for_server(place: RankPlace, *, deadline_s: float, roll: Roll) -> None:
    """Wait until somebody listens where rank 0 is to be found."""
    address = (place.master_addr, place.master_port)
    while True:
        try:
            socket.create_connection(address, timeout=5.0).close()
        except OSError as error:
            _look_for_dead(roll)
            if time.monotonic() > deadline_s:
                raise InfrastructureError(
                    f"rank {place.rank}: rank 0 did not answer at {place.master_addr}:"
                    f"{place.master_port} ({error.strerror or error}) within engine.timeout_s. "
                    "Check that it was started, and that no firewall is between the nodes."
                    f"{describe_stopped(roll)}"
                ) from error
        else:
            return
        time.sleep(_LOOK_S)


def _open_store(
    place: RankPlace, *, serves: bool, timeout_s: float, roll: Roll
) -> Store:
    deadline_s = time.monotonic() + timeout_s
    while True:
        attempt = _Attempt(place, serves=serves, timeout_s=timeout_s)
        while not attempt.is_over():
            _look_for_dead(roll)
            if time.monotonic() > deadline_s:
                raise _no_store(place, TimeoutError("no answer"), serves=serves)
        if attempt.store is not None:
            attempt.store.set_timeout(timedelta(seconds=timeout_s))
            return attempt.store
        error = attempt.error or RuntimeError("no store")
        if not isinstance(error, dist.DistError):
            raise error
        _look_for_dead(roll)
        if serves or time.monotonic() > deadline_s:
            raise _no_store(place, error, serves=serves) from error
        time.sleep(_LOOK_S)


class _Attempt:
    """One attempt to open the store, in a thread of its own.

    If another program listens at the address and never answers, torch waits for it without a
    limit, whatever its timeout says, and in C, where this process would hear no signal.
    """

    def __init__(self, place: RankPlace, *, serves: bool, timeout_s: float) -> None:
        self.store: Store | None = None
        self.error: Exception | None = None
        self._place = place
        self._serves = serves
        self._answer_s = min(timeout_s, _ANSWER_LIMIT_S)
        # A daemon: a thread that waits for good must not keep the process.
        self._thread = threading.Thread(target=self._open, name="store", daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        """Wait for a moment and tell whether the attempt has ended."""
        self._thread.join(_LOOK_S)
        return not self._thread.is_alive()

    def _open(self) -> None:
        try:
            self.store = TCPStore(
                host_name=self._place.master_addr,
                port=self._place.master_port,
                world_size=self._place.world_size,
                is_master=self._serves,
                timeout=timedelta(seconds=self._answer_s),
                # They are waited for by the caller, where a signal is heard.
                wait_for_workers=False,
            )
        except Exception as error:  # noqa: BLE001 - the waiting thread must meet it, whatever it is
            self.error = error


def _no_store(
    place: RankPlace, error: Exception, *, serves: bool
) -> InfrastructureError:
    text = str(error).strip() or type(error).__name__
    in_use = os.strerror(errno.EADDRINUSE).lower()
    if serves and ("EADDRINUSE" in text or in_use in text.lower()):
        return InfrastructureError(
            f"rank 0: port {place.master_port} is in use by another program, perhaps another run. "
            "Give the launcher another one: --master_port with deepspeed, --master-port with "
            "torchrun, or the variable MASTER_PORT."
        )
    return InfrastructureError(
        f"rank {place.rank}: no meeting at {place.master_addr}:{place.master_port}: "
        f"{text.splitlines()[0][:200]}. Check that no other program listens there."
    )


def _wait_for_ranks(
    store: Store, place: RankPlace, *, timeout_s: float, roll: Roll
) -> None:
    try:
        store.set(_name(place.rank), socket.gethostname())
        store.add(_COUNT, 1)
        deadline_s = time.monotonic() + timeout_s
        while (here := store.add(_COUNT, 0)) < place.world_size:
            _look_for_dead(roll)
            if time.monotonic() > deadline_s:
                raise _never_came(
                    store, place, here=here, timeout_s=timeout_s, roll=roll
                )
            time.sleep(_LOOK_S)
    except dist.DistError as error:
        _look_for_dead(roll)
        raise InfrastructureError(
            f"rank {place.rank}: the meeting at {place.master_addr}:{place.master_port} ended "
            f"({str(error).strip().splitlines()[0][:200]}): rank 0 or the launcher is gone, or "
            "another program listens there. Its own output says why."
        ) from error


def _never_came(
    store: Store, place: RankPlace, *, here: int, timeout_s: float, roll: Roll
) -> InfrastructureError:
    missing = [
        rank for rank in range(place.world_size) if not store.check([_name(rank)])
    ]
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return InfrastructureError(
        f"rank {place.rank}: {here} of {place.world_size} ranks came within engine.timeout_s "
        f"{timeout_s:g}; missing: rank {shown}. Check that every node was started with the same "
        f"number of nodes and ranks and reaches {place.master_addr}:{place.master_port}."
        f"{describe_stopped(roll)}"
    )


def _name(rank: int) -> str:
    return f"rank-{rank}"


def _look_for_dead(roll: Roll) -> None:
    gone = roll.gone()
    # One that was about to report is gone from the processes and has left the roll.
    if gone and roll.verdict() is None:
        raise rank_died(gone)
