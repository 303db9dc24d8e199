"""How replies reach callers of this process, and what wakes them: tasks of event loops, blocked threads, and futures.

The model thread hands a batch of replies to each sink with one call. A sink settles every receiver that is not settled
yet, and raises nothing.
"""

from __future__ import annotations

import asyncio
import math
import os
import select
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tensordict import TensorDictBase

from aioinfer.batching import Caller
from aioinfer.futures import Future, lock_timeout

if TYPE_CHECKING:
    from aioinfer.transports.base import Transport

__all__ = [
    "ALREADY_NOTIFIED",
    "FutureReplySink",
    "LockWaker",
    "LoopReplySink",
    "Outcome",
    "Receiver",
    "ReplySink",
    "ThreadReplySink",
    "TransportSink",
    "Waiter",
    "Waker",
    "make_waker",
    "unwrap",
]

ALREADY_NOTIFIED = (RuntimeError, BlockingIOError)
"""Errors that say that a waker has a notification already: of a free lock, or of a full descriptor."""


class Waker(Protocol):
    """Wakes one waiting thread. Any thread may notify; notifications that no thread waited for count as one."""

    notify_in_c: Callable[[], object]
    """``notify`` without Python code: no signal handler can interrupt it. It may raise ``ALREADY_NOTIFIED``."""

    def notify(self) -> None:
        """Wake the waiting thread, or else the next one that waits."""
        ...

    def wait(self, timeout: float | None) -> bool:
        """Block until a notification, or for ``timeout`` seconds; return whether there was one."""
        ...


class LockWaker:
    """A bare lock that ``notify`` releases. It costs a fraction of an ``Event``, which builds a ``Condition``."""

    __slots__ = ("_lock", "notify_in_c")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.notify_in_c: Callable[[], object] = self._lock.release

    def notify(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:  # it has a notification already
            pass

    def wait(self, timeout: float | None) -> bool:
        return self._lock.acquire(timeout=lock_timeout(timeout))


class _EventWaker:
    """An ``eventfd``, for threads that wait often: it takes a file descriptor, and wakes a thread sooner than a lock.

    The kernel knows of a write that the writer is about to sleep, and likes to run the reader on the same core;
    a lock's waiter is woken on another one. A reply comes 0.01 ms earlier, and 64 threads get 12 % more of them.
    """

    __slots__ = ("_fd", "_poll", "notify_in_c")

    def __init__(self) -> None:
        self._fd = os.eventfd(0)
        self.notify_in_c: Callable[[], object] = partial(os.eventfd_write, self._fd, 1)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def notify(self) -> None:
        os.eventfd_write(self._fd, 1)

    def wait(self, timeout: float | None) -> bool:
        if timeout is not None and not self._poll.poll(min(math.ceil(max(timeout, 0) * 1000), 2**31 - 1)):
            return False
        os.read(self._fd, 8)  # not os.eventfd_read, which raises InterruptedError after a signal
        return True

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def make_waker() -> Waker:
    """Make the waker with the fastest wake-up: an ``eventfd`` where the system has one left, else a lock."""
    try:
        return _EventWaker()
    except (AttributeError, OSError):  # not on Linux, or out of file descriptors
        return LockWaker()


Outcome: TypeAlias = "tuple[TensorDictBase | None, Exception | None]"
"""A reply or an error."""

# Up to so many tasks are known as callers before those that have ended are looked for.
_FEW_CALLERS = 256
# How many threads a batch wakes at once; each wakes one more before it goes on. Waking all 64 at once
# makes them and the model thread queue for the GIL: 64 000 req/s, against 84 000 with 2.
_WAKE_WIDTH = 2


class Receiver(Protocol):
    """The caller's end of one request."""

    def done(self) -> bool:
        """Whether the reply is there, or the caller went away."""
        ...


class ReplySink(Protocol):
    """A way back that many replies take at once."""

    def set_results(self, receivers: Sequence[Any], replies: Sequence[TensorDictBase]) -> None:
        """Hand each receiver its reply."""
        ...

    def set_exceptions(self, receivers: Sequence[Any], errors: Sequence[Exception]) -> None:
        """Hand each receiver its error."""
        ...

    def discard(self, receiver: Any) -> None:
        """Note that a cancelled request was taken out of the queue."""
        return


class TransportSink(ReplySink, Protocol):
    """The way back of requests that wait in a server's queue."""

    @property
    def transport(self) -> Transport:
        """The transport by which the requests came."""
        ...


class FutureReplySink(ReplySink):
    """Settles futures, for ``client.submit`` from threads."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def set_results(self, receivers: Sequence[Future[TensorDictBase]], replies: Sequence[TensorDictBase]) -> None:
        for future, reply in zip(receivers, replies, strict=True):
            future.settle(reply, None)

    def set_exceptions(self, receivers: Sequence[Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        for future, error in zip(receivers, errors, strict=True):
            future.settle(None, error)


# Up to Python 3.11 asyncio.current_task is a function of Python around this dictionary.
_current_task: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None] = (
    asyncio.tasks._current_tasks.get if sys.version_info < (3, 12) else asyncio.current_task  # type: ignore[attr-defined]
)


class LoopReplySink(ReplySink):
    """Settles the futures of one event loop's tasks: one wake-up per batch, however many replies.

    It also notifies the queue of its loop's requests, once per tick and at its end, so that all of them get into the
    batch. The next batch is held back for the requests that tasks are about to make: from the delivery of a batch to
    the end of the tick in which its tasks run, and from the first request of any other tick to its end.

    Any thread: ``runs_here``, ``running_task``. Loop thread only: ``caller``, ``notify_at_end_of_tick``,
    ``_notifying``. Model thread, or the thread that ends a request in its stead: ``set_results``, ``set_exceptions``,
    ``discard``.

    Args:
        loop: whose tasks.
        transport: the transport of their requests.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: Transport) -> None:
        self.loop = loop
        self.transport = transport
        self._notifying: list[bool] = []  # an element until the end of a tick in which there were requests
        self._thread = threading.get_ident()
        self._callers: dict[weakref.ref[asyncio.Task[Any]], Caller] = {}
        self._most_callers = _FEW_CALLERS

    def runs_here(self) -> bool:
        """Whether the caller runs on this loop, without the system call that ``get_running_loop`` makes up to 3.11."""
        return threading.get_ident() == self._thread and self.loop.is_running()

    def running_task(self) -> asyncio.Task[Any] | None:
        """The task of this loop that calls; ``None`` if it is no task, or one of another loop."""
        return _current_task(self.loop) if threading.get_ident() == self._thread else None

    def caller(self, task: asyncio.Task[Any]) -> Caller:
        """The caller that a task is."""
        ref = weakref.ref(task)
        caller = self._callers.get(ref)
        if caller is None:
            if len(self._callers) >= self._most_callers:  # many of them have ended, perhaps
                self._callers = {ref: caller for ref, caller in self._callers.items() if ref() is not None}
                self._most_callers = max(_FEW_CALLERS, 2 * len(self._callers))
            caller = self._callers[ref] = Caller()
        return caller

    def notify_at_end_of_tick(self) -> None:
        """Notify the queue once, when every task that this tick wakes has run."""
        if not self._notifying:
            self._end_tick()

    def _end_tick(self) -> None:
        wakeups = self.transport.queue.wakeups_in_flight
        # The flag is lowered in C, and raised last: an interrupted callback must not keep later requests from notice.
        self.loop.call_soon(self._notifying.clear)
        self.loop.call_soon(self._notify, wakeups)
        wakeups.append(True)  # the model thread, if it comes to the queue within this tick, waits for the rest of it
        self._notifying.append(True)

    def _notify(self, wakeups: list[bool]) -> None:
        _pop(wakeups)
        self.transport.queue.notify()  # the queue of this moment: a server may have taken the transport meanwhile

    def set_results(
        self, receivers: Sequence[asyncio.Future[TensorDictBase]], replies: Sequence[TensorDictBase]
    ) -> None:
        self._call_soon(asyncio.Future.set_result, receivers, replies)

    def set_exceptions(self, receivers: Sequence[asyncio.Future[TensorDictBase]], errors: Sequence[Exception]) -> None:
        self._call_soon(asyncio.Future.set_exception, receivers, errors)

    def _call_soon(self, *args: Any) -> None:
        wakeups = self.transport.queue.wakeups_in_flight
        wakeups.append(True)
        try:
            self.loop.call_soon_threadsafe(self._settle, wakeups, *args)
        except RuntimeError:  # the loop is closed, and its tasks with it
            _pop(wakeups)

    def _settle(
        self,
        wakeups: list[bool],
        settle: Callable[..., None],
        futures: Sequence[asyncio.Future[Any]],
        outcomes: Sequence[Any],
        interrupted: bool = False,
    ) -> None:
        try:
            for future, outcome in zip(futures, outcomes, strict=True):
                if not future.done():
                    settle(future, outcome)
            self._end_tick()  # after the tasks that were woken just now
            _pop(wakeups)
        except BaseException:
            if not interrupted:  # by a signal handler: the others get their replies all the same
                self.loop.call_soon(self._settle, wakeups, settle, futures, outcomes, True)
            raise


def _pop(wakeups: list[bool]) -> None:
    try:
        wakeups.pop()
    except IndexError:  # the model thread did not wait for this wake-up
        pass


class Waiter:
    """Receives a reply for a thread that blocks.

    A claim token decides how the wait ends: the model thread takes it to settle, the blocked thread to leave without
    a reply.

    Args:
        sink: wakes the thread in its turn.
        waker: of the thread.
    """

    __slots__ = ("_claim_token", "_left", "_resumed", "_sink", "_waker", "outcome")

    def __init__(self, sink: ThreadReplySink, waker: Waker) -> None:
        self._sink = sink
        self._waker = waker
        self._claim_token = [True]
        self._left = False
        self._resumed = False
        self.outcome: Outcome | None = None
        """What the thread has not read yet."""

    def settle(self, reply: TensorDictBase | None, error: Exception | None) -> bool:
        """Leave the outcome (model thread); return whether the thread is there to be woken for it."""
        try:
            self._claim_token.pop()
        except IndexError:
            return False
        self.outcome = reply, error
        return True

    def release(self) -> None:
        """Let the blocked thread go on."""
        self._waker.notify()

    def done(self) -> bool:
        """Whether the outcome is there, or the thread left."""
        return not self._claim_token

    def wait(self, timeout: float | None) -> Outcome:
        """Block for the reply, or the error; then the waiter is ready for the next one.

        If this raises, or anything else before the outcome is there, ``abandon`` the waiter.

        Raises:
            TimeoutError: nothing came within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        woken = self._waker.wait(timeout)
        while woken and self.outcome is None:  # released once more for the outcome before this one
            woken = self._waker.wait(None if deadline is None else deadline - time.monotonic())
        if not woken:
            self._left = True
        settled = woken or not self._claim()
        outcome, self.outcome = self.outcome, None
        if settled:
            self._resume()
        if outcome is None:
            raise TimeoutError(f"no reply within {timeout} seconds")
        self._left = self._resumed = False  # it left too late, if it was not woken
        self._claim_token.append(True)
        return outcome

    def abandon(self) -> None:
        """Leave without a reply, wherever the call was interrupted; a late reply is dropped. Idempotent."""
        if not self._left:
            self._left = True
            if not self._claim() and not self._resumed:  # it is this thread's turn to wake the next one
                self._resume()

    def _resume(self) -> None:
        self._resumed = True  # first: an interrupted thread must not do it twice
        self._sink.resumed()

    def _claim(self) -> bool:
        """Take the token; return whether the thread was quicker than the model thread."""
        try:
            self._claim_token.pop()
        except IndexError:
            return False
        return True


def unwrap(reply: TensorDictBase | None, error: Exception | None) -> TensorDictBase:
    """Return the reply, or raise the error."""
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback leads here: it must not lead back
    assert reply is not None
    return reply


class ThreadReplySink(ReplySink):
    """Wakes blocked threads, without a fight for the GIL.

    The threads that a batch answers wake one after the other, each waking the next; while some have not run yet, the
    next batch is held back, so that the requests which they are about to make get into it.

    Model thread, or the thread that ends a request in its stead: ``set_results``, ``set_exceptions``, ``discard``,
    ``wake_all``. Woken threads: ``resumed``. The deque and the list are shared without a lock, which their ``append``
    and ``pop`` allow. A woken thread that a signal interrupts may take the next one out of the deque and not wake it:
    ``wake_all`` does not rely on the deque.

    Args:
        transport: the transport of their requests.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._callers = threading.local()
        self._asleep: deque[Waiter] = deque()
        self._unread: list[Waiter] = []  # sleeping threads, and some that have read their outcome meanwhile

    def caller(self) -> Caller:
        """Who makes a request now: this thread."""
        try:
            caller: Caller = self._callers.own
        except AttributeError:
            caller = self._callers.own = Caller()
        return caller

    def set_results(self, receivers: Sequence[Waiter], replies: Sequence[TensorDictBase]) -> None:
        self._forget_awake()
        self._wake([waiter for waiter, reply in zip(receivers, replies, strict=True) if waiter.settle(reply, None)])

    def set_exceptions(self, receivers: Sequence[Waiter], errors: Sequence[Exception]) -> None:
        self._forget_awake()
        self._wake([waiter for waiter, error in zip(receivers, errors, strict=True) if waiter.settle(None, error)])

    def _forget_awake(self) -> None:
        """Before others are settled: a waiter is used again."""
        self._unread = [waiter for waiter in self._unread if waiter.outcome is not None]

    def _wake(self, waiters: Sequence[Waiter]) -> None:
        self._unread += waiters
        self.transport.queue.wakeups_in_flight.extend([True] * len(waiters))
        self._asleep.extend(waiters)
        for _ in range(min(_WAKE_WIDTH, len(waiters))):
            self._wake_next()

    def _wake_next(self) -> None:
        if self._asleep:
            try:
                self._asleep.popleft().release()
            except IndexError:  # another thread woke the last one
                pass

    def resumed(self) -> None:
        """Wake the next thread (a thread that was settled and runs again); the last one notifies the queue."""
        self._wake_next()
        queue = self.transport.queue
        wakeups = queue.wakeups_in_flight
        try:
            wakeups.pop()
        except IndexError:  # the model thread did not wait for this wake-up
            return
        if not wakeups:
            queue.notify()

    def wake_all(self) -> None:
        """Wake all sleeping threads: the chain takes long, or broke with a thread that was interrupted."""
        while self._asleep:
            self._wake_next()
        for waiter in self._unread:
            if waiter.outcome is not None:
                waiter.release()
        self._unread = []
