"""Threads that block for a reply, and how they are woken without fighting over the interpreter lock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from tensordict import TensorDictBase

from aioinfer.wakers import Waker

__all__ = ["Outcome", "Sleepers", "Waiter", "unwrap"]

Outcome: TypeAlias = "tuple[TensorDictBase | None, Exception | None]"
"""A reply or an error."""

# How many threads a batch wakes at once; each wakes one more before it goes on. Waking all 64 at once
# makes them and the model thread queue for the interpreter lock: 64 000 req/s, against 84 000 with 2.
_WAKE_WIDTH = 2


class Waiter:
    """Receives a reply for a thread that blocks.

    Whoever takes the ticket decides how the wait ends: the model thread takes it to settle, the
    blocked thread to leave without a reply.

    Args:
        sleepers: where the thread takes its turn.
        bell: wakes the thread.
    """

    __slots__ = ("_bell", "_gone", "_resumed", "_sleepers", "_ticket", "outcome")

    def __init__(self, sleepers: Sleepers, bell: Waker) -> None:
        self._sleepers = sleepers
        self._bell = bell
        self._ticket = [True]
        self._gone = False
        self._resumed = False
        self.outcome: Outcome | None = None
        """What the thread has not read yet."""

    def settle(self, reply: TensorDictBase | None, error: Exception | None) -> bool:
        """Model thread: leave the outcome, and say whether somebody is there to be woken for it."""
        try:
            self._ticket.pop()
        except IndexError:
            return False
        self.outcome = reply, error
        return True

    def release(self) -> None:
        """Let the blocked thread go on."""
        self._bell.notify()

    def done(self) -> bool:
        """Whether the outcome is there, or the thread left."""
        return not self._ticket

    def wait(self, timeout: float | None) -> Outcome:
        """Block for the reply, or the error; then the waiter is ready for the next one.

        Whatever is raised here or elsewhere before the outcome is there: ``abandon`` the waiter.

        Raises:
            TimeoutError: nothing came within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        woken = self._bell.wait(timeout)
        while woken and self.outcome is None:  # released once more for the outcome before this one
            woken = self._bell.wait(None if deadline is None else deadline - time.monotonic())
        if not woken:
            self._gone = True
        settled = woken or not self._leave()
        outcome, self.outcome = self.outcome, None
        if settled:
            self._resume()
        if outcome is None:
            raise TimeoutError(f"no reply within {timeout} seconds")
        if woken:
            self._resumed = False
            self._ticket.append(True)
        return outcome

    def abandon(self) -> None:
        """Leave without a reply, wherever the call was interrupted: what still comes is thrown away. Idempotent."""
        if not self._gone:
            self._gone = True
            if not self._leave() and not self._resumed:  # it is this thread's turn to wake the next one
                self._resume()

    def _resume(self) -> None:
        self._resumed = True  # first: an interrupted thread must not do it twice
        self._sleepers.resumed()

    def _leave(self) -> bool:
        """Whether the thread left before the model thread settled."""
        try:
            self._ticket.pop()
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


class Sleepers:
    """The way back to blocked threads.

    The threads that a batch answers wake one after the other, each waking the next; while some have not
    run yet, the next batch is held back, so that the requests which they are about to make get into it.

    Model thread, or who ends a request in its stead: ``deliver``, ``fail``, ``drop``, ``wake_all``. Woken threads:
    ``resumed``. The deque and the
    list are shared without a lock, which their ``append`` and ``pop`` allow. A woken thread that a signal interrupts
    may take the next one out of the deque and not wake it: ``wake_all`` does not rely on the deque.

    Args:
        waking: gets an element for each thread that is settled, and loses one when it runs.
        ring: called by the last thread that a batch woke.
    """

    def __init__(self, waking: list[bool], ring: Callable[[], None]) -> None:
        self._waking = waking
        self._ring = ring
        self._asleep: deque[Waiter] = deque()
        self._unread: list[Waiter] = []  # those that sleep, and some that don't any more

    def deliver(self, receivers: Sequence[Waiter], replies: Sequence[TensorDictBase]) -> None:
        self._forget_those_that_have_read()
        self._wake([w for w, reply in zip(receivers, replies, strict=True) if w.settle(reply, None)])

    def fail(self, receivers: Sequence[Waiter], errors: Sequence[Exception]) -> None:
        self._forget_those_that_have_read()
        self._wake([w for w, error in zip(receivers, errors, strict=True) if w.settle(None, error)])

    def drop(self, receiver: Waiter) -> None:
        pass

    def _forget_those_that_have_read(self) -> None:
        """Before others are settled: a waiter is used again."""
        self._unread = [waiter for waiter in self._unread if waiter.outcome is not None]

    def _wake(self, waiters: Sequence[Waiter]) -> None:
        self._unread += waiters
        self._waking.extend([True] * len(waiters))
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
        """A thread that was settled runs again: it wakes the next, and the last one says so."""
        self._wake_next()
        try:
            self._waking.pop()
        except IndexError:  # the model thread did not wait for it
            return
        if not self._waking:
            self._ring()

    def wake_all(self) -> None:
        """Wake all that are left: the chain takes long, or broke with a thread that was interrupted."""
        while self._asleep:
            self._wake_next()
        for waiter in self._unread:
            if waiter.outcome is not None:
                waiter.release()
        self._unread = []
