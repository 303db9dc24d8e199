"""Wait for descriptors: a selector that is a waker too, and two functions that wait for some descriptors once."""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from typing import Protocol

__all__ = ["Selector", "Source", "await_readable", "wait_readable"]

Handler = Callable[[], None]

# Seconds after which a thread that waits for the lock returns, to see whether it is to end.
_LOCK_TIMEOUT = 0.05


class Source(Protocol):
    """Anything with a descriptor. It must not be closed while somebody who refers to it waits for it."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class Selector:
    """Wakes the thread that waits, and calls the handlers of descriptors that are readable.

    One thread at a time may ``wait``; any thread may do the rest. Handlers run under ``lock``, one at a time, on
    the thread that waits or polls.

    Args:
        lock: shared with other pollers.
    """

    def __init__(self, lock: threading.RLock | None = None) -> None:
        self.lock = threading.RLock() if lock is None else lock
        self._selector = selectors.DefaultSelector()
        self._sources = selectors.DefaultSelector()  # the same, without the wake-up descriptor
        self._reader, self._writer = _waker_descriptors()
        self.notify_in_c: Callable[[], object] = partial(os.write, self._writer, _ONE)
        self._selector.register(self._reader, selectors.EVENT_READ)

    def fileno(self) -> int:
        """A descriptor that is readable while a handler waits to be called."""
        return self._sources.fileno()

    def notify(self) -> None:
        with suppress(BlockingIOError):  # it has a notification already
            os.write(self._writer, _ONE)

    def wait(self, timeout: float | None) -> bool:
        """Block until a notification, or until handlers were called, or for ``timeout`` seconds; at most for an hour.

        Returns:
            Whether there was a notification.
        """
        events = self._selector.select(None if timeout is None else min(timeout, _LONGEST))
        if not self.lock.acquire(timeout=_LOCK_TIMEOUT):  # its holder may wait for this very thread to end
            return True
        try:
            return self._handle(events)
        finally:
            self.lock.release()

    def poll(self) -> None:
        """Call the handlers of descriptors that are readable now."""
        with self.lock:
            self._handle(self._sources.select(0))

    def _handle(self, events: Sequence[tuple[selectors.SelectorKey, int]]) -> bool:
        """Under the lock."""
        notified = False
        for key, _ in events:
            if key.data is not None:
                key.data()
            else:
                notified = True
                with suppress(BlockingIOError):
                    os.read(self._reader, 8)
        return notified

    def register(self, source: Source, handler: Handler, *, writable: bool = False) -> None:
        """Call ``handler`` while ``source`` is readable, or ``writable``."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writable else 0)
        with self.lock:
            for selector in (self._selector, self._sources):
                try:
                    selector.modify(source, events, handler)
                except KeyError:
                    selector.register(source, events, handler)

    def unregister(self, source: Source) -> None:
        """Call its handler no more; before ``source`` is closed."""
        with self.lock:
            for selector in (self._selector, self._sources):
                with suppress(KeyError):
                    selector.unregister(source)

    def __del__(self) -> None:
        if hasattr(self, "_writer"):
            self._selector.close()
            self._sources.close()
            for descriptor in {self._reader, self._writer}:
                os.close(descriptor)


_ONE = (1).to_bytes(8, "little")


def _waker_descriptors() -> tuple[int, int]:
    """The descriptors by which a thread is woken: of an ``eventfd``, or of a pipe where there is none."""
    if hasattr(os, "eventfd"):
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return fd, fd
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    return reader, writer


_LONGEST = 3600.0  # seconds; the system calls take no more than some weeks


def wait_readable(sources: Sequence[Source], timeout: float | None) -> None:
    """Block until one of ``sources`` is readable, or ``timeout`` seconds passed; it may return early."""
    wait([source.fileno() for source in sources], _LONGEST if timeout is None else min(timeout, _LONGEST))


# By event loop and descriptor: who waits for it. A loop has one reader for a descriptor. Each entry belongs to its
# loop's thread.
_waiting: dict[tuple[asyncio.AbstractEventLoop, int], set[asyncio.Future[None]]] = {}


async def await_readable(sources: Sequence[Source], timeout: float | None) -> None:  # noqa: ASYNC109 - as above
    """Suspend until one of ``sources`` is readable, or ``timeout`` seconds passed; it may return early.

    Raises:
        OSError: the event loop can't watch them.
    """
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    watched: list[int] = []
    try:
        for source in sources:
            watched.append(fd := source.fileno())
            waiting = _waiting.setdefault((loop, fd), set())
            waiting.add(ready)
            if len(waiting) == 1:
                loop.add_reader(fd, _wake, waiting)
        await asyncio.wait([ready], timeout=timeout)
    finally:
        for fd in watched:
            waiting = _waiting[loop, fd]
            waiting.discard(ready)
            if not waiting:
                del _waiting[loop, fd]
                loop.remove_reader(fd)


def _wake(waiting: set[asyncio.Future[None]]) -> None:
    for ready in waiting:
        if not ready.done():
            ready.set_result(None)
