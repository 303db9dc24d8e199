"""The requests of this process that wait for a batch: any thread puts, the model thread takes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import ServerClosedError, own_error
from aioinfer.interaction import Mode, caller_mode
from aioinfer.transports.admission import Admission
from aioinfer.transports.bells import LockBell
from aioinfer.transports.outlets import Outlet
from aioinfer.transports.room import RoomQueue
from aioinfer.transports.sleepers import Sleepers

__all__ = ["PendingQueue", "Request"]

# How long, in seconds, a batch is held back for the callers that the one before has woken: at most until none of them
# has run for the one time, or until the other has passed. 64 threads take 0.4 to 1 ms on two cores.
_HOLD_BACK = 0.001
_MOST_HOLD_BACK = 0.005


class Request:
    """One request on its way: what is asked, in which mode, since when, and where the reply goes.

    ``outlet`` is ``None`` where only the transport's own ``resolve`` knows what ``receiver`` is.
    """

    __slots__ = ("mode", "outlet", "receiver", "submitted_at", "td")

    def __init__(
        self, td: TensorDictBase, receiver: Any, outlet: Outlet | None, submitted_at: float, mode: Mode
    ) -> None:
        self.td = td
        self.receiver = receiver
        self.outlet = outlet
        self.submitted_at = submitted_at
        self.mode = mode


class PendingQueue:
    """Requests in order of arrival.

    Waiting moves nothing: ``wait`` only looks, ``take`` never blocks.

    Any thread: ``put``, ``ring``, ``wake``, ``room``, ``open``, ``close``, ``len``.
    Model thread only: ``wait``, ``take``, ``waited``. ``_requests`` is appended to without a lock, which
    a deque allows; whoever removes requests, or counts them against the bound, holds ``_lock``, and
    whoever removes a request settles it.
    """

    def __init__(self) -> None:
        self.admission = Admission()
        self._requests: deque[Request] = deque()
        self._bell = LockBell()
        self._closed: ServerClosedError | None = None
        self._wanted = self._enough = 0  # what the model thread sleeps for, see wait; 0: it does not sleep
        self._lock = threading.Lock()
        self.room = RoomQueue(self._full)
        self.waking: list[bool] = []
        self.sleepers = Sleepers(self.waking, self.ring)

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
        if 0 < self._wanted <= len(self._requests) and (not self.waking or len(self._requests) >= self._enough):
            self.wake()

    def wake(self) -> None:
        """Make the running ``wait``, or else the next one, return."""
        self._wanted = 0
        self._bell.ring()

    def _full(self) -> bool:
        admission = self.admission
        limit = admission.max_pending
        return limit is not None and len(self._requests) >= limit and admission.closed is None

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
        self._wanted, self._enough = at_least, enough
        if self.waking and timeout != 0 and len(self._requests) < enough:
            self._hold_back(_MOST_HOLD_BACK if timeout is None else min(timeout, _MOST_HOLD_BACK))
        elif len(self._requests) < at_least:
            self._bell.wait(timeout)
        self._wanted = 0
        return len(self._requests)

    def _hold_back(self, limit: float) -> None:
        """Wait for the callers that were woken, as long as one after the other runs."""
        deadline = time.perf_counter() + limit
        while True:
            left = len(self.waking)
            if self._bell.wait(min(_HOLD_BACK, limit)):
                return
            limit = deadline - time.perf_counter()
            if len(self.waking) >= left or limit <= 0:
                self.waking.clear()
                self.sleepers.wake_all()
                return

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
        if self.room:
            self.room.announce(len(taken) + len(dropped))
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
            queued = [self._requests.popleft() for _ in range(len(self._requests))]
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


def answer(requests: Sequence[Request], outcomes: Sequence[Any], *, failed: bool) -> None:
    """Settle requests of this process, with one call for each way back that they came by.

    Args:
        requests: claimed before, and settled by nobody else.
        outcomes: a reply for each, or an error for each if ``failed``.
        failed: whether ``outcomes`` are errors.
    """
    outlets = {request.outlet for request in requests}
    for outlet in outlets:
        receivers: Sequence[Any] = [request.receiver for request in requests if request.outlet is outlet]
        own = outcomes
        if len(outlets) > 1:
            own = [outcome for request, outcome in zip(requests, outcomes, strict=True) if request.outlet is outlet]
        if outlet is not None:
            (outlet.fail if failed else outlet.deliver)(receivers, own)
