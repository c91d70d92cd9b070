"""Signals set a flag; a second one ends the process; launchers are told from shells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.limits import HANG_S, wait_until
from train.process.preemption import Preemption, find_launchers
from train.process.world import World


def wait_for_request(preemption: Preemption) -> None:
    wait_until(preemption.requested, what="a request")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
)
def test_each_signal_asks_to_stop_and_handlers_are_put_back(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    with Preemption(World()) as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        wait_for_request(preemption)
        assert preemption.reason == number.name
        assert preemption.requested()
    assert signal.getsignal(number) == before


@pytest.fixture
def ignored_hangup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("ignored_hangup")
def test_nohup_is_respected_but_for_the_ranks_of_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Preemption(World()) as preemption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert not preemption.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_request(preemption)
        assert preemption.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    # torchrun kills its ranks some seconds after it has passed the signal on.
    launchers = [(psutil.Process(), "torchrun")]
    monkeypatch.setattr("train.process.preemption.find_launchers", lambda: launchers)
    with Preemption(World()) as preemption:
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for_request(preemption)
        assert preemption.reason == "SIGHUP"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_agreement_happens_only_when_due() -> None:
    with Preemption(World(), agree_every=3) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: preemption.reason, what="a reason")
        assert [preemption.requested() for _ in range(4)] == [False, False, True, True]


def test_a_launchers_second_signal_at_once_counts_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # However long this machine takes between the two.
    monkeypatch.setattr("train.process.preemption.REPEAT_AFTER_S", HANG_S)
    with Preemption(World()) as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_request(preemption)
        preemption.disarm()


STUCK = """
import ctypes, sys
sys.path.insert(0, {root!r})
from train.process import preemption
from train.process.world import World
preemption.REPEAT_AFTER_S = 0.0
with preemption.Preemption(World()):
    print("ready", flush=True)
    # A call into C that no signal interrupts, as a collective whose peer is gone.
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.slow
def test_a_second_signal_ends_a_process_whose_main_thread_is_stuck() -> None:
    root = str(Path(__file__).resolve().parents[2])
    code = STUCK.format(root=root)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGUSR1)  # an early warning is not the first of two
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
        child.send_signal(signal.SIGTERM)
        assert child.wait(HANG_S) == 128 + signal.SIGTERM
        assert child.stderr is not None
        assert b"second SIGTERM" in child.stderr.read()


def test_a_shell_is_no_launcher() -> None:
    assert find_launchers() == []


def test_a_forked_child_does_not_pass_its_signals_on() -> None:
    with Preemption(World()) as preemption:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write_end, b"x")
            threading.Event().wait(HANG_S)
            os._exit(0)
        os.read(read_end, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not preemption.requested()
        os.close(read_end)
        os.close(write_end)
