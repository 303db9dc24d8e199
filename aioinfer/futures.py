"""Futures that no thread leaves locked or half settled, whatever interrupts it or is raised in a callback."""

from __future__ import annotations

import _thread
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from aioinfer.wakers import LockWaker

__all__ = ["Future", "run_in_thread"]

T = TypeVar("T")

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
        """Set the outcome, unless the future was cancelled, or settled by whoever holds it."""
        try:
            if error is None:
                self.set_result(result)  # type: ignore[arg-type]
            else:
                self.set_exception(error)
        except concurrent.futures.InvalidStateError:
            pass

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
        bell = LockWaker()
        callback = _Guarded(lambda _: bell.notify())
        super().add_done_callback(callback)
        if not bell.wait(timeout):
            with self._condition:
                if callback in self._done_callbacks:
                    self._done_callbacks.remove(callback)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        super().add_done_callback(_Guarded(fn))


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
        except BaseException as error:  # for whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
