"""The requests of this process that wait for a batch: any thread puts, the model thread takes."""

from __future__ import annotations

import operator
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import repeat, starmap
from typing import Any

from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import ServerClosedError, clone_exception
from aioinfer.interaction_type import caller_mode
from aioinfer.transports.admission import Admission
from aioinfer.transports.outlets import Outlet
from aioinfer.transports.requests import Request, answer
from aioinfer.transports.room import RoomQueue, seconds_left
from aioinfer.transports.sleepers import Sleepers
from aioinfer.wakers import ALREADY_NOTIFIED, LockWaker, Waker

__all__ = ["PendingQueue"]

# How long, in seconds, a batch is held back for the callers that the one before has woken: at most until none of them
# has run for the one time, or until the other has passed. 64 threads take 0.4 to 1 ms on two cores.
_HOLD_BACK = 0.001
_MOST_HOLD_BACK = 0.005


class PendingQueue:
    """Requests in order of arrival.

    Waiting moves nothing: ``wait`` only looks, ``take`` never blocks.

    Several queues can share one model thread: a family. What is said of "pending" below is said of all of them.

    Any thread: ``put``, ``admit``, ``ring``, ``wake``, ``room``, ``open``, ``close``, ``len``.
    Model thread only: ``wait``, ``stand_by``, ``take``, ``waited``. Requests are appended and removed without a lock,
    which a deque allows; whoever removes a request settles it. Whoever counts requests against the bound holds
    ``_lock``, which the family shares; the model thread never waits for it, since an interrupted caller may hold it for
    as long as a signal handler runs.
    """

    def __init__(self) -> None:
        self.admission = Admission()
        self.bell: Waker = LockWaker()
        self._requests: deque[Request] = deque()
        self._patient: deque[Request] = deque()  # those of other processes that wait for room
        self._closed: ServerClosedError | None = None
        self._wanted = self._enough = 0  # what the model thread sleeps for, see wait
        self._to_be_woken: list[bool] = []  # one element while it sleeps, which whoever wakes it takes
        self.room = RoomQueue(self._full)
        self.waking: list[bool] = []
        self.sleepers = Sleepers(self.waking, self.ring)
        self.leave(self.bell)
        _queues.add(self)

    def join(self, family: Sequence[PendingQueue], bell: Waker, lock: threading.RLock) -> None:
        """Share the model thread, which ``bell`` wakes, and the bound with the others of ``family``."""
        self._family = family
        self.bell = bell
        self._lock = lock
        self._ring_once = self._to_be_woken.pop, bell.notify_in_c

    def leave(self, bell: Waker) -> None:
        """Have a model thread of its own."""
        self.join((self,), bell, threading.RLock())

    def leave_to_parent(self) -> None:
        """In a forked child: the requests and the model thread are the parent's."""
        self._requests.clear()
        self._patient.clear()
        self.waking.clear()
        self._to_be_woken.clear()
        self.admission.leave_to_parent()
        self._closed = self.admission.closed
        self.leave(LockWaker() if isinstance(self.bell, LockWaker) else self.bell)

    def _count(self) -> int:
        if len(self._family) == 1:
            return len(self._requests)
        return sum([len(queue._requests) for queue in self._family])

    def __len__(self) -> int:
        return sum(not request.receiver.done() for request in tuple(self._requests))

    # -- callers ---------------------------------------------------------------------------------------

    def put(self, td: TensorDictBase, receiver: Any, outlet: Outlet) -> None:
        """Check a request and append it; wakes nobody, see :meth:`ring`.

        Raises:
            InferenceError: it is refused.
        """
        admission = self.admission
        request = Request(td, receiver, outlet, time.perf_counter(), caller_mode())
        if (
            admission.unchecked
            and admission.closed is None
            and not admission.refusals
            and type(td) is TensorDict
            and td.batch_size == admission.batch_size
        ):
            self._requests.append(request)
        else:
            admission.check(td)
            if not self._put_bounded(request):
                raise admission.overloaded()
        if self._closed is not None:  # closed since the check: whoever pops the request fails it
            self._fail_all(self._closed)

    def put_when_room(self, td: TensorDictBase, receiver: Any, outlet: Outlet, timeout: float | None) -> float | None:
        """Do as :meth:`put`, but wait up to ``timeout`` seconds for room; return how many of them are left.

        Raises:
            TimeoutError: there was no room.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.room.put(partial(self.put, td, receiver, outlet), deadline)
        return seconds_left(deadline)

    def admit_all(self, requests: Sequence[Request]) -> None:
        """Do as :meth:`admit` with several."""
        admission = self.admission
        if admission.unchecked and admission.closed is None and not admission.refusals and self._closed is None:
            self._requests.extend(requests)
            if self._closed is not None:
                self._fail_all(self._closed)
        else:
            for request in requests:
                self.admit(request)

    def admit(self, request: Request, *, patient: bool = False) -> None:
        """Append a request that another process has made and checked; wakes nobody.

        Args:
            request: answered with an error if it is refused.
            patient: wait for room where there is none.
        """
        admission = self.admission
        if self._closed is not None:
            answer([request], [clone_exception(self._closed)], failed=True)
        elif admission.refusals:
            answer([request], [admission.paused()], failed=True)
        elif not self._put_bounded(request, patient=patient):
            answer([request], [admission.overloaded()], failed=True)
        elif self._closed is not None:
            self._fail_all(self._closed)

    def _put_bounded(self, request: Request, *, patient: bool = False) -> bool:
        """Append a request if there is room, or, if ``patient``, to those that wait for room; say whether it was."""
        if self.admission.max_pending is None:
            self._requests.append(request)
            return True
        with self._lock:
            if self._full():
                for queue in self._family:
                    queue._remove_cancelled()
            full = self._full()
            if not full:
                self._requests.append(request)
            elif patient:
                self._patient.append(request)
        for queue in self._family:  # the model thread may have made room, and not got the lock
            if queue._patient and not self._full():
                with self._lock:
                    queue._move_patient()
        return patient or not full

    def _remove_cancelled(self) -> None:
        for request in tuple(self._requests):
            if request.receiver.done():
                try:
                    self._requests.remove(request)
                except ValueError:  # the model thread has taken it
                    continue
                self._drop([request])

    def _admit_patient(self) -> None:
        """Model thread: let requests become pending that have waited for room, unless who has the lock will do so."""
        if self._lock.acquire(blocking=False):
            try:
                self._move_patient()
            finally:
                self._lock.release()

    def _move_patient(self) -> None:
        """Under the lock."""
        while self._patient and not self._full():
            for request in _pop(self._patient, 1):  # none, if the queue is closed meanwhile
                if request.receiver.done():
                    self._drop([request])
                elif self.admission.refusals:
                    answer([request], [self.admission.paused()], failed=True)
                else:
                    self._requests.append(request)
                    if self._closed is not None:
                        self._fail_all(self._closed)

    def ring(self) -> None:
        """Wake the model thread if it sleeps and what it waits for is there."""
        if (
            self._to_be_woken
            and self._wanted <= (count := self._count())
            and (not self.waking or count >= self._enough)
        ):
            try:
                # One call of C code: no signal handler can come in between, and leave a sleeper whom nobody wakes.
                list(map(operator.call, self._ring_once))
            except (IndexError, *ALREADY_NOTIFIED):  # another thread was quicker
                pass

    def wake(self) -> None:
        """Make the running ``wait``, or else the next one, return."""
        self.bell.notify()

    def _full(self) -> bool:
        admission = self.admission
        limit = admission.max_pending
        return limit is not None and self._count() >= limit and admission.closed is None

    # -- the model thread ------------------------------------------------------------------------------

    def wait(self, at_least: int, enough: int, timeout: float | None) -> int:
        """Block until requests are pending, ``wake`` was called, or ``timeout`` seconds passed.

        Args:
            at_least: how many requests to wait for.
            enough: as many need not wait for the callers that the batch before has woken, as fewer do.
            timeout: seconds; ``None`` waits for ever.

        Returns:
            How many are pending, those that were cancelled included.
        """
        family = self._family
        for queue in family:
            queue._wanted, queue._enough = at_least, enough
            queue._to_be_woken.append(True)
        pending = self._count()
        if timeout != 0 and pending < enough and self._waking():
            self._hold_back(_MOST_HOLD_BACK if timeout is None else min(timeout, _MOST_HOLD_BACK))
        elif pending < at_least:
            for queue in family:
                queue.sleepers.wake_all()  # nobody is on the way who would
                queue._enough = 0  # nobody is waited for now, whoever is settled beside this thread
            if self._count() < at_least:
                self.bell.wait(timeout)
        for queue in family:
            queue._to_be_woken.clear()
        return self._count()

    def stand_by(self) -> None:
        """Block until ``wake`` was called, whatever is pending; it may return early."""
        self.wait(sys.maxsize, sys.maxsize, None)

    def _hold_back(self, limit: float) -> None:
        """Wait for the callers that were woken, as long as one after the other runs."""
        deadline = time.perf_counter() + limit
        while True:
            left = self._waking()
            if self.bell.wait(min(_HOLD_BACK, limit)):
                return
            limit = deadline - time.perf_counter()
            if self._waking() >= left or limit <= 0:
                for queue in self._family:
                    queue.waking.clear()
                    queue.sleepers.wake_all()
                return

    def _waking(self) -> int:
        if len(self._family) == 1:
            return len(self.waking)
        return sum([len(queue.waking) for queue in self._family])

    def waited(self) -> float:
        """Seconds since the oldest pending request was submitted."""
        try:
            return time.perf_counter() - self._requests[0].submitted_at
        except IndexError:
            return 0.0

    def take(self, max_items: int) -> list[Request]:
        """Claim up to ``max_items`` requests; those whose callers went away are dropped and don't count."""
        taken: list[Request] = []
        dropped = 0
        while self._requests and (room := max_items - len(taken)) > 0:
            some = _pop(self._requests, room)
            if any([request.receiver.done() for request in some]):  # noqa: C419 - faster, and all are false
                gone, some = _partition(some)
                dropped += len(gone)
                self._drop(gone)
            taken += some
        for queue in self._family:
            if queue._patient:
                queue._admit_patient()
            if queue.room:
                queue.room.announce(len(taken) + dropped)
        return taken

    def _drop(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.outlet is not None:
                request.outlet.drop(request.receiver)
            self.admission.stats.cancel(1)

    # -- opening and closing ---------------------------------------------------------------------------------------

    def open(self, admission: Admission) -> None:
        """Take requests under the terms of ``admission``, which must not be those of a second running server."""
        self.admission.hand_over(admission)
        self.admission = admission
        self._closed = None

    def close(self, error: ServerClosedError) -> None:
        """Refuse what comes from now on, and fail what is pending."""
        self.admission.close(error)
        self._closed = error
        self._fail_all(error)
        self.room.announce()
        self.sleepers.wake_all()

    def _fail_all(self, error: ServerClosedError) -> None:
        for queue in (self._requests, self._patient):
            dropped, live = _partition(_pop(queue, len(queue)))
            self._drop(dropped)
            self.admission.stats.fail(len(live))
            answer(live, [clone_exception(error) for _ in live], failed=True)


def _pop(queue: deque[Request], count: int) -> list[Request]:
    """Take up to ``count`` requests out, in order; other threads may do so at the same time."""
    popped: list[Request] = []
    try:
        popped.extend(starmap(queue.popleft, repeat((), min(count, len(queue)))))
    except IndexError:
        pass
    return popped


def _partition(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Split into those whose callers went away, and the others."""
    parts: tuple[list[Request], list[Request]] = ([], [])
    for request in requests:
        parts[not request.receiver.done()].append(request)
    return parts


_queues: weakref.WeakSet[PendingQueue] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for queue in list(_queues):
        queue.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)
