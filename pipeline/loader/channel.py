"""A bounded hand-over between two threads that can be closed, and that carries errors to the
reader."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class ChannelClosedError(Exception):
    """The other side has gone; a thread that meets this ends."""


class Channel(Generic[T]):
    """Pass items in order from one thread to another.

    Unlike a queue, closing it wakes both sides at once, so that no thread is ever left waiting for
    one that ended.

    Args:
        capacity: items that may wait before `put` blocks.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None

    def __len__(self) -> int:
        # Without the lock: only the one that reads asks, and then there are no fewer.
        return len(self._items)

    def put(self, item: T) -> None:
        """Hand over an item; blocks while the channel is full.

        Raises:
            ChannelClosedError: the channel was closed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or len(self._items) < self._capacity
            )
            if self._closed:
                raise ChannelClosedError
            self._items.append(item)
            # All, not one: both sides wait on the same condition.
            self._changed.notify_all()

    def get(self) -> T:
        """Take the next item; blocks while there is none.

        Raises:
            ChannelClosedError: the channel was closed.
            BaseException: the error that the writing side failed with, after the items before it.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._items or self._error is not None
            )
            # Items before errors: what was read before a failure is as good as ever.
            if self._items and not self._closed:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise ChannelClosedError

    def fail(self, error: BaseException) -> None:
        """Let the reader meet an error once it has taken what came before."""
        with self._changed:
            # The first failure is the cause; later ones follow from it.
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """End both sides now."""
        with self._changed:
            self._closed = True
            # Batches hold images: their memory must not wait for the channel to go.
            self._items.clear()
            self._changed.notify_all()
