"""The hand-over between threads: order, back-pressure, errors after items, and nobody left
waiting."""

from __future__ import annotations

import threading

import pytest

from pipeline.loader.channel import Channel, ChannelClosedError
from tests.limits import HANG_S


def test_items_arrive_in_order_and_never_more_than_the_capacity_wait():
    channel: Channel[int] = Channel(2)
    most = 0

    def write() -> None:
        for item in range(100):
            channel.put(item)

    writer = threading.Thread(target=write)
    writer.start()
    received = []
    for _ in range(100):
        most = max(most, len(channel))
        received.append(channel.get())
    writer.join()
    assert received == list(range(100))
    assert most <= 2


def test_an_error_comes_after_what_was_handed_over_before_it():
    channel: Channel[int] = Channel(3)
    channel.put(1)
    channel.fail(OSError("disk"))
    assert channel.get() == 1
    for _ in range(2):
        with pytest.raises(OSError, match="disk"):
            channel.get()


@pytest.mark.parametrize("side", ["get", "put"])
def test_closing_wakes_a_thread_that_waits(side):
    channel: Channel[int] = Channel(1)
    if side == "put":
        channel.put(0)
    ended = []

    def wait() -> None:
        try:
            channel.get() if side == "get" else channel.put(1)
        except ChannelClosedError:
            ended.append(True)

    waiter = threading.Thread(target=wait)
    waiter.start()
    channel.close()
    waiter.join(timeout=HANG_S)
    assert ended == [True]
