"""Futures that no thread leaves locked or half settled, whatever interrupts it or is raised in a callback."""

from __future__ import annotations

import _thread
import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

__all__ = ["Future", "LockFreeFuture", "lock_timeout", "run_in_thread"]

T = TypeVar("T")

_DONE = ("CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED")

_log = logging.getLogger("aioinfer")


class _Condition(_thread.RLock):  # type: ignore[misc]  # it is a base in fact
    """What ``concurrent.futures`` needs of the condition of a future: entered and left in C.

    ``threading.Condition.__enter__`` is Python code. Where a signal handler raises inside it, for example on Ctrl-C,
    the lock stays taken for ever, and the thread that wants to settle the future waits for it for ever.
    """

    def notify_all(self) -> None:
        """Wake nobody: who waits for a :class:`Future` does so with a callback."""

    def wait(self, timeout: float | None) -> bool:
        """Do not wait, for the same reason: the time is over."""
        return False


class Future(concurrent.futures.Future[T]):
    """A ``concurrent.futures.Future`` for callers and for jobs of ours.

    A thread that waits for its ``result`` or ``exception`` and is interrupted by a signal handler that raises holds no
    lock afterwards. (One in ``concurrent.futures.wait`` or ``as_completed`` may: these lock in Python.) Whatever a
    callback raises is logged, and costs neither the other callbacks nor the thread that settles the future.
    """

    def __init__(self) -> None:
        super().__init__()
        self._condition = _Condition()  # type: ignore[assignment]
        self._done_callbacks: list[Any]

    def settle(self, result: T | None, error: BaseException | None) -> None:
        """Set the outcome, unless the future was cancelled, or settled by its holder."""
        try:
            if error is None:
                self.set_result(result)  # type: ignore[arg-type]
            else:
                self.set_exception(error)
        except concurrent.futures.InvalidStateError:
            pass

    def done(self) -> bool:
        return self._state in _DONE  # without the lock, which one look does not need

    def set_running_or_notify_cancel(self) -> bool:
        return self._state != "CANCELLED_AND_NOTIFIED" and super().set_running_or_notify_cancel()

    def cancel(self) -> bool:
        cancelled = super().cancel()
        with self._condition:
            if self._state == "CANCELLED":  # tell those in concurrent.futures.wait at once
                self.set_running_or_notify_cancel()
        return cancelled

    def result(self, timeout: float | None = None) -> T:
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        return super().exception(0)

    def _wait(self, timeout: float | None) -> None:
        if self.done():
            return
        lock = threading.Lock()
        lock.acquire()
        callback = _Guarded(lambda _: lock.release())
        super().add_done_callback(callback)
        if not lock.acquire(timeout=lock_timeout(timeout)):
            with self._condition:
                if callback in self._done_callbacks:
                    self._done_callbacks.remove(callback)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        super().add_done_callback(_Guarded(fn))


def lock_timeout(timeout: float | None) -> float:
    """The argument of ``Lock.acquire`` for a timeout in seconds, whatever its size; ``None`` waits for ever."""
    return -1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)


class _Guarded:
    """A callback from which nothing is raised."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[Any], object]) -> None:
        self._callback = callback

    def __call__(self, future: Any) -> None:
        try:
            self._callback(future)
        except BaseException:  # also SystemExit: this thread has other futures to settle
            _log.exception("a callback of a future failed: %r", self._callback)


def run_in_thread(action: Callable[[], T], name: str) -> Future[T]:
    """Run ``action`` in a thread of its own, which does not keep the program from ending.

    The future can't be cancelled. Pools have a limit: what must end a server can't wait there for calls that wait for
    the server.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = action()
        except BaseException as error:  # for the thread that waits
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class LockFreeFuture(Generic[T]):
    """A future without a lock and without cancellation, for outcomes that signal handlers wait for.

    A handler may wait for the future that the interrupted thread waits for. With a :class:`Future` it could interrupt
    that thread while it holds the future's lock, which the thread that sets the result needs.

    Any thread may call all methods. Only the first outcome counts.
    """

    def __init__(self) -> None:
        self.done = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._waiters: deque[Callable[[], object]] = deque()  # each is called once `done` is set

    def set_result(self, result: T) -> None:
        """Finish with a result."""
        self._finish(result, None)

    def set_exception(self, error: BaseException) -> None:
        """Finish with an exception."""
        self._finish(None, error)

    def _finish(self, result: T | None, error: BaseException | None) -> None:
        if self.done:
            return
        self._result, self._error = result, error
        self.done = True
        while self._waiters:
            self._waiters.popleft()()

    @property
    def error(self) -> BaseException | None:
        """The exception that it has finished with, if any."""
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the future is done, or ``timeout`` seconds passed; return whether it is done."""
        if not self.done:
            lock = threading.Lock()
            lock.acquire()
            self._waiters.append(lock.release)  # if this is too late to be called, `done` is set
            if not self.done:
                lock.acquire(timeout=lock_timeout(timeout))
        return self.done

    async def async_wait(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - as wait
        """Do as :meth:`wait`, without blocking the event loop. Cancellation does not affect the future."""
        if not self.done:
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.append(partial(_wake, loop, waiter))
            if not self.done:
                await asyncio.wait([waiter], timeout=timeout)
        return self.done

    def result(self) -> T:
        """Block until the future is done, and return its result, or raise its exception."""
        self.wait()
        try:
            return self._outcome()
        finally:
            del self  # an exception's traceback refers to this frame, which must not refer to the exception

    async def async_result(self) -> T:
        """Do as :meth:`result`, without blocking the event loop."""
        await self.async_wait()
        try:
            return self._outcome()
        finally:
            del self

    def _outcome(self) -> T:
        try:
            if self._error is not None:
                raise self._error
            return self._result  # type: ignore[return-value]
        finally:
            del self


def _wake(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
