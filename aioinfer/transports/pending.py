"""The requests of this process that wait for a batch: any thread puts, the model thread takes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import InferenceError, ServerClosedError, own_error
from aioinfer.interaction import caller_mode
from aioinfer.transports.admission import Admission
from aioinfer.transports.bells import Bell, LockBell
from aioinfer.transports.outlets import Outlet
from aioinfer.transports.requests import Request, answer
from aioinfer.transports.room import RoomQueue
from aioinfer.transports.sleepers import Sleepers

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
    Model thread only: ``wait``, ``take``, ``waited``. ``_requests`` is appended to without a lock, which
    a deque allows; whoever removes requests, or counts them against the bound, holds ``_lock``, and
    whoever removes a request settles it.
    """

    def __init__(self) -> None:
        self.admission = Admission()
        self.bell: Bell = LockBell()
        self._requests: deque[Request] = deque()
        self._patient: deque[Request] = deque()  # those of other processes that wait for room
        self._family: Sequence[PendingQueue] = (self,)
        self._closed: ServerClosedError | None = None
        self._wanted = self._enough = 0  # what the model thread sleeps for, see wait; 0: it does not sleep
        self._lock = threading.Lock()
        self.room = RoomQueue(self._full)
        self.waking: list[bool] = []
        self.sleepers = Sleepers(self.waking, self.ring)

    def join(self, family: Sequence[PendingQueue], bell: Bell) -> None:
        """Share the model thread with the others of ``family``, which ``bell`` wakes; before it waits."""
        self._family = family
        self.bell = bell

    def leave(self, bell: Bell) -> None:
        """Have a model thread of its own."""
        self._family = (self,)
        self.bell = bell

    def _count(self) -> int:
        if len(self._family) == 1:
            return len(self._requests)
        return sum([len(queue._requests) for queue in self._family])

    def __len__(self) -> int:
        return sum(not request.receiver.cancelled() for request in tuple(self._requests))

    # -- callers ---------------------------------------------------------------------------------------

    def put(self, td: TensorDictBase, receiver: Any, outlet: Outlet) -> None:
        """Check a request and append it; wakes nobody, see :meth:`ring`."""
        admission = self.admission
        request = Request(td, receiver, outlet, time.perf_counter(), caller_mode())
        if admission.open and type(td) is TensorDict and td.batch_size == admission.batch_size:
            self._requests.append(request)
        else:
            admission.check(td)
            self._put_bounded(request)
        if self._closed is not None:  # closed since the check: whoever pops the request fails it
            self._fail_all(self._closed)

    def admit_all(self, requests: Sequence[Request]) -> None:
        """Do as :meth:`admit` with several."""
        if self.admission.open and self._closed is None:
            self._requests.extend(requests)
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
        try:
            if self._closed is not None:
                raise own_error(self._closed)
            if admission.refusing:
                raise admission.paused()
            if patient and self._full():
                self._patient.append(request)
            else:
                self._put_bounded(request)
        except InferenceError as error:
            answer([request], [error], failed=True)

    def _admit_patient(self) -> None:
        while self._patient and not self._full():
            request = self._patient.popleft()
            if request.receiver.cancelled():
                self._drop([request])
            else:
                self.admit(request, patient=True)

    def _put_bounded(self, request: Request) -> None:
        dropped: list[Request] = []
        with self._lock:
            if self._full():
                dropped = self._pop_cancelled()
            full = self._full()
            if not full:
                self._requests.append(request)
        self._drop(dropped)
        if full:
            raise self.admission.overloaded()

    def _pop_cancelled(self) -> list[Request]:
        """Under the lock: take cancelled requests out, keep the order of the others."""
        queued = [self._requests.popleft() for _ in range(len(self._requests))]
        dropped, live = _partition(queued)
        self._requests.extend(live)
        return dropped

    def ring(self) -> None:
        """Wake the model thread if it sleeps and what it waits for is there."""
        if 0 < self._wanted <= (count := self._count()) and (not self.waking or count >= self._enough):
            self.wake()

    def wake(self) -> None:
        """Make the running ``wait``, or else the next one, return."""
        self._wanted = 0
        self.bell.ring()

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
        pending = self._count()
        if timeout != 0 and pending < enough and self._waking():
            self._hold_back(_MOST_HOLD_BACK if timeout is None else min(timeout, _MOST_HOLD_BACK))
        elif pending < at_least:
            self.bell.wait(timeout)
        for queue in family:
            queue._wanted = 0
        return self._count()

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
        requests = self._requests
        taken: list[Request] = []
        dropped: list[Request] = []
        with self._lock:
            while requests and len(taken) < max_items:
                some = [requests.popleft() for _ in range(min(max_items - len(taken), len(requests)))]
                if any([request.receiver.cancelled() for request in some]):  # noqa: C419 - faster, and all are false
                    gone, some = _partition(some)
                    dropped += gone
                taken += some
        if dropped:
            self._drop(dropped)
        for queue in self._family:
            if queue._patient:
                queue._admit_patient()
            if queue.room:
                queue.room.announce(len(taken) + len(dropped))
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

    def _fail_all(self, error: ServerClosedError) -> None:
        with self._lock:
            queued = [queue.popleft() for queue in (self._requests, self._patient) for _ in range(len(queue))]
        dropped, live = _partition(queued)
        self._drop(dropped)
        for request in live:
            self.admission.stats.fail(1)
            answer([request], [own_error(error)], failed=True)


def _partition(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Split into those whose callers went away, and the others."""
    parts: tuple[list[Request], list[Request]] = ([], [])
    for request in requests:
        parts[not request.receiver.cancelled()].append(request)
    return parts
