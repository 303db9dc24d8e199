"""An outcome that one thread settles, and that other threads and event loops wait for."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

__all__ = ["Completion"]

T = TypeVar("T")


class Completion(Generic[T]):
    """A value or an error that comes once.

    It is a ``concurrent.futures.Future`` without its lock: an exception that a signal handler raises in a waiting
    thread can't leave anything locked that the settling thread needs, and a signal handler may wait for what the
    thread that it interrupts waits for too.

    Any thread: all methods. Settling twice is settling once.
    """

    def __init__(self) -> None:
        self.done = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._waiters: deque[Callable[[], None]] = deque()  # each is called once `done` is set

    # -- settling --------------------------------------------------------------------------------------

    def succeed(self, value: T) -> None:
        """Settle it with a value."""
        self._settle(value, None)

    def fail(self, error: BaseException) -> None:
        """Settle it with an error."""
        self._settle(None, error)

    def _settle(self, value: T | None, error: BaseException | None) -> None:
        if self.done:
            return
        self._value, self._error = value, error
        self.done = True
        while self._waiters:
            self._waiters.popleft()()

    # -- waiting ---------------------------------------------------------------------------------------

    def wait_done(self, timeout: float | None = None) -> bool:
        """Block until it is settled, or ``timeout`` seconds passed; say whether it is."""
        lock = threading.Lock()
        lock.acquire()
        self._waiters.append(lock.release)  # one that comes too late to be called finds `done` set
        if not self.done:
            lock.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX))
        return self.done

    async def await_done(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as wait_done
        """Do as :meth:`wait_done`, without blocking the event loop. Cancellation leaves the outcome alone."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiters.append(partial(_wake, loop, future))
        if not self.done:
            await asyncio.wait([future], timeout=timeout)
        return self.done

    # -- the outcome -----------------------------------------------------------------------------------

    @property
    def error(self) -> BaseException | None:
        """The error that it was settled with, if one."""
        return self._error

    def outcome(self) -> T:
        """Return the value that it was settled with, or raise the error."""
        assert self.done
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the traceback of the error leads here: it must not lead back
        return self._value  # type: ignore[return-value]


def _wake(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
