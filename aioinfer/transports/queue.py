"""The requests that wait for a batch: transports put them, the model thread takes them.

There is one queue for each server, whatever the number of its transports. So it has the one bound on pending requests,
and it alone says when requests are refused: ``pause``, ``refuse`` and ``close``.
"""

from __future__ import annotations

import asyncio
import logging
import operator
import os
import sys
import threading
import time
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any

import anyio
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.batching import Caller
from aioinfer.client import AsyncInferenceClient
from aioinfer.entries import (
    Entries,
    RequestLike,
    check_entries,
    is_checked,
    make_request,
    make_td,
    row_count,
)
from aioinfer.errors import (
    InvalidRequestError,
    ServerClosedError,
    ServerOverloadedError,
    ServerPausedError,
    clone_exception,
)
from aioinfer.futures import run_in_thread
from aioinfer.interaction_type import caller_mode
from aioinfer.ipc.selector import Selector
from aioinfer.stats import StatsRecorder
from aioinfer.tensors import RequestSpec, is_nested
from aioinfer.transports.replies import ALREADY_NOTIFIED, LockWaker, Receiver, ThreadReplySink, TransportSink, Waker
from aioinfer.transports.request import NamedRequest, Request, set_exceptions, set_results, split

if TYPE_CHECKING:
    from aioinfer.transports.base import Transport
    from aioinfer.transports.polling import PollingTransport

__all__ = [
    "REFUSALS",
    "Admission",
    "NotFull",
    "RefusableAsyncClient",
    "RequestQueue",
    "RowCount",
    "call_uninterrupted",
    "seconds_left",
]

REFUSALS = (ServerClosedError, ServerPausedError, ServerOverloadedError)
"""What a server answers to a valid request that it does not take; ``submit`` reports it through the future."""

# Seconds for which a batch is held back for the callers that the one before has woken: at most until none of them
# has run for the one time, or until the other has passed. 64 threads take 0.4 to 1 ms on two cores.
LINGER = 0.001
MOST_LINGER = 0.005
_LATEST_PASSES = 64

_log = logging.getLogger("aioinfer")


class Admission:
    """The terms under which a server takes requests, checked in the caller's thread.

    Any thread. There is no lock: ``closed`` and ``pauses`` are each changed in one step, and code that derives
    something from them looks again afterwards.

    Args:
        request_spec: an example of one row; ``None`` takes rows of any layout without batch dimension.
        max_pending: most rows that may wait; ``None`` is without bound.
        stats: counts what is refused and dropped.
        version_key: the entry of replies that has the version of the weights; ``None``: replies have none.
        empty_reply: makes the reply to a request without rows, given the batch size of a row.
    """

    def __init__(
        self,
        request_spec: TensorDictBase | None = None,
        max_pending: int | None = None,
        stats: StatsRecorder | None = None,
        version_key: str | None = None,
        empty_reply: Callable[[torch.Size], TensorDictBase] | None = None,
    ) -> None:
        if max_pending is not None and (
            not isinstance(max_pending, int) or isinstance(max_pending, bool) or max_pending < 1
        ):
            raise ValueError(f"max_pending must be an integer of at least 1, or None, got {max_pending!r}")
        self.spec = None if request_spec is None else RequestSpec(request_spec)
        self.batch_size = torch.Size([]) if self.spec is None else self.spec.batch_size
        self.max_pending = max_pending
        self.stats = StatsRecorder() if stats is None else stats
        self.version_key = version_key
        self._empty_reply = empty_reply
        self.closed: ServerClosedError | None = None
        self.pauses: set[object] = set()
        """Pauses during which requests are refused."""
        self.unchecked = self.spec is None and max_pending is None
        """Whether a TensorDict of the right batch size needs no check but that requests are taken at all."""

    def check(self, td: TensorDictBase | Entries) -> bool:
        """Let a request through, or count it as rejected and raise. Entries that are no tensors are replaced.

        Returns:
            Whether it has a dimension of rows.

        Raises:
            InvalidRequestError: no TensorDict, or not of the layout that the server takes.
            ServerClosedError: the server is shut down.
            ServerPausedError: it is paused, and refuses requests meanwhile.
        """
        if self.closed is not None:
            raise clone_exception(self.closed)
        if self.pauses:
            raise self.reject_paused()
        return self.check_layout(td)

    def check_layout(self, td: TensorDictBase | Entries) -> bool:
        """Do as :meth:`check`, whether or not requests are taken now."""
        if type(td) is dict:
            return self._check_entries(td)
        if not isinstance(td, TensorDictBase):
            self.stats.reject()
            raise InvalidRequestError(
                f"a request must be a TensorDict, a mapping, or entries by name, got {type(td).__qualname__}"
            )
        batched = td.batch_size != self.batch_size
        if batched and td.batch_size[1:] != self.batch_size:
            self.stats.reject()
            several = ", ".join(map(str, ["n", *self.batch_size]))
            raise InvalidRequestError(
                f"the request has batch size {list(td.batch_size)}, requests to this server have "
                f"{list(self.batch_size)}, or [{several}] for n rows"
                " (flatten its batch dimensions to one, or give the server a request_spec)"
            )
        self.check_spec(td, batched=batched)
        return batched

    def _check_entries(self, entries: Entries) -> bool:
        spec = self.spec
        try:
            check_entries(entries, {} if spec is None else spec.dtypes)
            if spec is None:
                return False
            td = self.make_td(entries)
            batched = td.batch_size != self.batch_size
            spec.check(td, batched=batched)
            entries |= {name: value for name, value in td.items() if is_nested(value)}  # of its batch size
        except InvalidRequestError:
            self.stats.reject()
            raise
        return batched

    def row_count(self, entries: Entries) -> int | None:
        """How many rows admitted entries have; ``None``: no dimension of rows, as far as a ``request_spec`` tells."""
        return None if self.spec is None else row_count(entries, self.spec.shapes)

    def make_td(self, entries: Entries) -> TensorDict:
        """Make a TensorDict of admitted entries."""
        rows = self.row_count(entries)
        return make_td(entries, self.batch_size if rows is None else torch.Size((rows, *self.batch_size)))

    def check_spec(self, td: TensorDictBase, *, batched: bool = False) -> None:
        """Do as :meth:`check_layout`, where the transport knows the layout, but not the server's ``request_spec``."""
        if self.spec is not None:
            try:
                self.spec.check(td, batched=batched)
            except InvalidRequestError:
                self.stats.reject()
                raise

    def empty_reply(self) -> TensorDictBase:
        """The reply to a request without rows."""
        if self._empty_reply is None:
            return TensorDict({}, batch_size=(0, *self.batch_size))
        return self._empty_reply(self.batch_size)

    def reject_paused(self) -> ServerPausedError:
        """Count a request as rejected and return the error for its caller."""
        self.stats.reject()
        return self.paused_error()

    def paused_error(self) -> ServerPausedError:
        """The error for a caller whose request a pause refuses."""
        return ServerPausedError("the server is paused; try again when it goes on")

    def reject_overloaded(self) -> ServerOverloadedError:
        """Count a request as rejected and return the error for its caller."""
        self.stats.reject()
        return ServerOverloadedError(
            f"the queue is full: at most {self.max_pending} rows may be pending (max_pending={self.max_pending}); "
            "try again later, or call with wait=True"
        )


def seconds_left(deadline: float | None) -> float | None:
    """Seconds until a time on the clock of ``time.monotonic``; ``None`` if there is none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class NotFull:
    """Wakes as many waiting callers as a bounded queue has space for: threads and tasks, FIFO.

    Any thread; what is shared is a deque, each change of which is one step. A caller that was woken must try again, and
    may find the space taken. A caller that goes away after it was woken notifies the next, so that no space is left
    unannounced: ``wait`` and ``await_space`` add an element to ``turn`` where the caller was woken.

    Args:
        full: whether the queue has no space now for so many rows.
    """

    def __init__(self, full: Callable[[int], bool]) -> None:
        self._full = full
        self._waiters: deque[Callable[[], bool]] = deque()  # each wakes a caller, and returns whether it could

    def __bool__(self) -> bool:
        """Whether any caller waits."""
        return bool(self._waiters)

    def notify(self, count: int | None = None) -> None:
        """Wake the ``count`` callers that have waited longest; all, if ``None``."""
        left = len(self._waiters) if count is None else count
        while left > 0:
            try:
                wake = self._waiters.popleft()
            except IndexError:
                return
            left -= wake()  # the turn of a caller whose event loop is closed goes to the next

    def wait(self, rows: int, deadline: float | None, turn: list[bool]) -> None:
        """Block until there may be space for so many rows.

        Raises:
            TimeoutError: there was none until ``deadline``, on the clock of ``time.monotonic``.
        """
        waker = LockWaker()

        def wake() -> bool:
            waker.notify()
            return True

        try:
            self._add_waiter(wake, rows)
            if not waker.wait(seconds_left(deadline)):
                raise TimeoutError("there was no room in the queue of pending requests within the timeout")
            turn.append(True)
        except BaseException:
            self._remove_waiter(wake)
            raise

    async def await_space(self, rows: int, turn: list[bool]) -> None:
        """Suspend until there may be space for so many rows."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> bool:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:  # that loop is closed
                return False
            return True

        try:
            self._add_waiter(wake, rows)
            await woken.wait()
            turn.append(True)
        except BaseException:
            self._remove_waiter(wake)
            raise

    def _add_waiter(self, wake: Callable[[], bool], rows: int) -> None:
        self._waiters.append(wake)
        if not self._full(rows):  # there may have been space before we were in line
            self.notify(1)

    def _remove_waiter(self, wake: Callable[[], bool]) -> None:
        try:
            self._waiters.remove(wake)
        except ValueError:  # it was woken already
            self.notify(1)


class RowCount(bytearray):
    """A count of rows that any thread changes in one step: an element for each, since an integer would take two."""

    def add(self, rows: int) -> None:
        """Count so many more."""
        self.extend(bytes(rows))

    def adding(self, rows: int) -> Callable[[], None]:
        """A function of C that counts so many more."""
        return partial(self.extend, bytes(rows))

    def remove(self, rows: int) -> None:
        """Count so many less."""
        del self[:rows]

    def removing(self, rows: int) -> Callable[[], None]:
        """A function of C that counts so many less."""
        return partial(self.__delitem__, slice(rows))


class RefusableAsyncClient(AsyncInferenceClient):
    """Base of awaitable clients whose requests are refused where they are put: all but how they are put."""

    _transport: Transport

    @abstractmethod
    def _put(self, td: Any) -> asyncio.Future[TensorDictBase]:
        """Do as ``submit``; raise what the server refuses."""

    def submit(self, td: RequestLike | None = None, **entries: Any) -> asyncio.Future[TensorDictBase]:
        if td is None:
            td = entries
        elif entries or type(td) is not TensorDict:
            td = make_request(td, entries)
        try:
            return self._put(td)
        except REFUSALS as error:
            refused: asyncio.Future[TensorDictBase] = asyncio.get_running_loop().create_future()
            refused.set_exception(error.with_traceback(None))
            return refused

    async def __call__(
        self,
        td: RequestLike | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        *,
        wait: bool = False,
        **entries: Any,
    ) -> TensorDictBase:
        if td is None:
            td = entries
        elif entries or type(td) is not TensorDict:
            td = make_request(td, entries)
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self(td, wait=wait)
        if wait:
            return await (await self._transport.aput_when_not_full(td, partial(self._put, td)))
        return await self._put(td)


class RequestQueue:
    """Requests in order of arrival, of all transports of one server.

    Waiting moves nothing: ``wait`` only looks, ``get_batch`` never blocks.

    A transport has a queue of its own until a server attaches it to the server's. Then its requests follow it there:
    those that are pending, and those that a caller puts here because it had looked before.

    Any thread: ``put``, ``put_remote``, ``withdraw``, ``notify``, ``wake``, ``not_full``, ``attach``, ``pause``,
    ``refuse``, ``close``, ``len``. Model thread only: ``wait``, ``stand_by``, ``get_batch``, ``oldest``. Requests are
    appended and removed without a lock, which a deque allows; the thread that removes a request settles it. A thread
    that counts requests against the bound holds ``_lock``; the model thread never waits for it, since an interrupted
    caller may hold it for as long as a signal handler runs.

    Args:
        admission: the server's terms; by default those of a transport that has no server yet.
        max_batch_size: most requests that a batch takes.
        selector: where the model thread waits, if several transports need one.
    """

    def __init__(
        self, admission: Admission | None = None, max_batch_size: int = 64, selector: Selector | None = None
    ) -> None:
        self.admission = Admission() if admission is None else admission
        self.max_batch_size = max_batch_size
        self.transports: list[Transport] = []
        self.thread_sinks: list[ThreadReplySink] = []
        self.pumps: list[PollingTransport] = []
        self.serving = False
        """Whether a model thread serves it, or is about to."""
        self.released = False
        """Whether a transport was attached to another queue: then this one serves no more until all come back."""
        self.waker: Waker = selector or LockWaker()
        """Wakes the model thread."""
        self.wakeups_in_flight: list[bool] = []
        """An element for each wake-up that the last batch has caused, until its tasks or its thread have run, and for
        each tick of an event loop in which there were requests, until it ends."""
        self.not_full = NotFull(self.full)
        self.pass_seconds: deque[float] = deque(maxlen=_LATEST_PASSES)
        """Of the latest forward passes; the model thread appends to it."""
        self._requests: deque[Request] = deque()
        self._more_rows = RowCount()  # of these requests, beyond the first of each
        self._waiting_remote: deque[Request] = deque()  # requests of other processes that wait for space
        self._closed: ServerClosedError | None = None
        self._failed: list[Transport] = []
        self._failure: BaseException | None = None
        self._stray = False  # whether requests that are put now must go elsewhere
        self._wanted = self._enough = 0  # what the model thread sleeps for, see wait
        self._to_be_woken: list[bool] = []  # an element while the model thread sleeps; who wakes it takes it
        self._lock = threading.RLock()
        self._use(self.waker)
        _queues.add(self)

    def _use(self, waker: Waker) -> None:
        self.waker = waker
        self._wake_once = self._to_be_woken.pop, waker.notify_in_c

    def forget_parent(self) -> None:
        """In a forked child: the requests and the model thread are the parent's, and so is the news of its end."""
        for shared in (self._requests, self._waiting_remote, self.wakeups_in_flight, self._to_be_woken):
            shared.clear()
        self._more_rows.clear()
        self.admission.stats.forget_parent()
        if self.serving:
            self.serving = False
            self.admission.closed = ServerClosedError(
                "the server is in the process from which this one was forked; hand this process a client of an "
                "MPTransport or of a ProcessSlotTransport"
            )
        self._closed = self.admission.closed
        self._stray = self._stray or self._closed is not None
        self._lock = threading.RLock()
        if isinstance(self.waker, LockWaker):
            self._use(LockWaker())
        for transport in self.transports:
            transport.forget_parent()

    def __len__(self) -> int:
        """How many rows wait, those of cancelled requests left out."""
        while True:
            held = self._held()
            queued = sum([request.rows for request in self._requests.copy() if not request.receiver.done()])
            if held == self._held():  # else some may have moved into the queue meanwhile, and count twice or never
                return held + queued

    def holds(self, receiver: Receiver) -> bool:
        """Whether the request of this receiver waits here: no batch has taken it yet."""
        return self._find(receiver) is not None

    def _find(self, receiver: Receiver) -> Request | None:
        return next((request for request in self._requests.copy() if request.receiver is receiver), None)

    def _held(self) -> int:
        """How many rows of pending requests are still in their transports."""
        return sum([transport.held() for transport in self.transports])

    def pending(self) -> int:
        """How many rows wait now; what other processes have sent is read first."""
        if isinstance(self.waker, Selector):
            _uninterrupted(self.read, "aioinfer-read")
        return len(self)

    # -- transports ------------------------------------------------------------------------------------

    def attach(self, transports: Sequence[Transport]) -> None:
        """Serve these transports from now on: all of them or none. A signal handler does not interrupt it halfway.

        Raises:
            RuntimeError: one of them has a running server.
            OSError: one of them can't listen at its address.
        """
        _uninterrupted(lambda: self._attach(transports), "aioinfer-attach")

    def _attach(self, transports: Sequence[Transport]) -> None:
        for transport in transports:
            transport.check_attach(self)
        try:
            for transport in transports:
                transport.attach(self)
        except BaseException:  # its address is taken, say
            self.detach(ServerClosedError("the server could not open all of its transports"))
            raise

    def release(self, transport: Transport) -> None:
        """A transport was attached to another queue: its requests follow it."""
        self.released = True
        self._stray = True
        if transport in self.transports:
            self.transports.remove(transport)
        self.pumps = [pump for pump in self.pumps if pump is not transport]
        self._redirect()
        self.not_full.notify()

    def selector(self, own: Selector) -> Selector:
        """The selector on which the model thread waits; ``own`` if it has waited for requests of this process only."""
        if not isinstance(self.waker, Selector):
            self._use(own)
            return own
        return self.waker

    def callers(self) -> int | None:
        """How many rows will be pending if no further request brings several; ``None`` if that is unknown."""
        counts = [transport.callers() for transport in self.transports]
        if None in counts:
            return None
        return sum([count for count in counts if count is not None]) + len(self._more_rows)

    def _redirect(self) -> None:
        """Hand over the requests of transports that are attached to another queue, and fail the others if closed."""
        for request in (*self._requests, *self._waiting_remote):
            self._redirect_one(request)
        if self._closed is not None:
            self._fail_all(self._closed)

    def _redirect_one(self, request: Request) -> None:
        queue = request.sink.transport.queue
        if queue is self:
            if self._closed is not None:
                self._fail_all(self._closed)
        elif self._remove(request):
            queue.put_remote(request, checked=True)
            queue.notify()
        elif _remove(self._waiting_remote, request):
            queue.put_remote(request, wait=True)
            queue.notify()

    # -- callers ---------------------------------------------------------------------------------------

    def put(self, td: Any, receiver: Any, sink: TransportSink, caller: Caller | None = None) -> None:
        """Check a request and append it; wakes no thread, see :meth:`notify`.

        Args:
            td: a TensorDict, or entries by name, which are the queue's from now on.
            receiver: of its reply.
            sink: by which the reply goes there.
            caller: who makes one request after the other, if that is known.

        Raises:
            InferenceError: it is refused.
        """
        admission = self.admission
        now = time.perf_counter()
        if caller is not None:
            caller.asked_at = now
        kind = type(td)
        if kind is dict:
            size = admission.batch_size
            request: Request = NamedRequest(td, size, receiver, sink, now, caller_mode(), caller)
        else:
            request = Request(td, receiver, sink, now, caller_mode(), caller)
        if (
            admission.unchecked
            and admission.closed is None
            and not admission.pauses
            and ((kind is TensorDict and td.batch_size == admission.batch_size) or (kind is dict and is_checked(td)))
        ):
            self._requests.append(request)
        else:
            if admission.check(td):
                request.set_rows()
            if not self._put_bounded(request):
                self.notify()  # callers that were interrupted may not have done so
                raise admission.reject_overloaded()
        if self._stray:  # since the check: the thread that removes the request settles it
            self._redirect_one(request)

    def put_remote_all(self, requests: Sequence[Request]) -> None:
        """Do as :meth:`put_remote` with several."""
        admission = self.admission
        if (
            admission.unchecked
            and admission.closed is None
            and not admission.pauses
            and not self._stray
            and not any([request.batched for request in requests])  # noqa: C419 - faster
        ):
            self._requests.extend(requests)
            if self._stray:
                self._redirect()
        else:
            for request in requests:
                self.put_remote(request)

    def put_remote(self, request: Request, *, wait: bool = False, checked: bool = False) -> None:
        """Append a request that was made elsewhere; wakes no thread.

        Args:
            request: answered with an error if it is refused.
            wait: let it wait for space where there is none.
            checked: whether it was admitted before, by the queue that its transport had then.
        """
        admission = self.admission
        if self._closed is not None:
            set_exceptions([request], [clone_exception(self._closed)])
        elif admission.pauses and not checked:
            set_exceptions([request], [admission.reject_paused()])
        elif checked:
            self._append(request)
        elif not self._put_bounded(request, wait=wait):
            set_exceptions([request], [admission.reject_overloaded()])
        if self._stray:
            self._redirect_one(request)

    def _put_bounded(self, request: Request, *, wait: bool = False) -> bool:
        """Append a request if there is space, or let it ``wait`` for space; return whether it was one of both."""
        rows = request.rows
        if self.admission.max_pending is None or rows == 0:
            (self._requests.append if rows == 1 else self._append)(request)
            return True
        cancelled: list[Request] = []
        with self._lock:
            if full := self.full(rows):
                cancelled = self._remove_cancelled()
                full = self.full(rows)
            if not full:
                self._append(request)
            elif wait:
                self._waiting_remote.append(request)
        self._drop(cancelled)  # which may call the code of a custom transport
        # The model thread may have made space, and not got the lock.
        if self._waiting_remote and self._has_space_for_waiting():
            with self._lock:
                self._move_waiting()
        return wait or not full

    def _append(self, request: Request) -> None:
        """Append an admitted request; one without rows is answered at once."""
        if request.rows == 0:
            self.admission.stats.succeed(1)
            set_results([request], [self.admission.empty_reply()])
            return
        if request.rows == 1:
            self._requests.append(request)
        else:
            call_uninterrupted(*self._appending(request))

    def _appending(self, request: Request) -> list[Callable[[], object]]:
        """The calls that append a request with rows."""
        append = partial(self._requests.append, request)
        return [append] if request.rows == 1 else [self._more_rows.adding(request.rows - 1), append]

    def _remove(self, request: Request) -> bool:
        """Take one pending request out; return whether it was there, and not taken by another thread."""
        if request.rows == 1:
            return _remove(self._requests, request)
        try:
            call_uninterrupted(partial(self._requests.remove, request), self._more_rows.removing(request.rows - 1))
        except ValueError:
            return False
        return True

    def withdraw(self, receiver: Receiver) -> bool:
        """Take the request of this receiver out; whoever calls settles the receiver.

        Returns:
            Whether it was here: then it is never computed. If not, a batch has taken it, or some of its rows, or is
            about to.
        """
        request = self._find(receiver)
        if request is None or not self._remove(request):
            return False
        self._drop([request])
        if self._waiting_remote:
            with self._lock:
                self._move_waiting()
            self.notify()
        if self.not_full:
            self.not_full.notify(request.rows)
        return True

    def reserve(self, rows: int, note: Callable[[], object]) -> bool:
        """``note`` that a transport claims space for a request on its way in, if there is any; return whether."""
        with self._lock:
            if not self.full(rows):
                note()
                return True
            cancelled = self._remove_cancelled()
            if reserved := not self.full(rows):
                note()
        self._drop(cancelled)
        return reserved

    def put_reserved(self, requests: Sequence[Request], note: Callable[[], object]) -> None:
        """Append requests that their transport has counted as pending, and ``note`` that it need not do so any more.

        Both are one step, so that whoever counts what is pending counts them once: ``note`` is a function of C.
        """
        append = [call for request in requests if request.rows for call in self._appending(request)]
        with self._lock:
            call_uninterrupted(note, *append)
        for request in requests:
            if not request.rows:
                self._append(request)
        if self._stray:
            self._redirect()
        self.notify()

    def _remove_cancelled(self) -> list[Request]:
        """Take cancelled requests out, which must be dropped then. Under the lock."""
        cancelled = [request for request in self._requests.copy() if request.receiver.done()]
        return [request for request in cancelled if self._remove(request)]

    def _has_space_for_waiting(self) -> bool:
        """Whether the request that has waited longest for space may become pending."""
        try:
            return not self.full(self._waiting_remote[0].rows)
        except IndexError:  # there is none, or another thread was quicker
            return False

    def _move_waiting(self) -> None:
        """Let requests become pending that have waited for space. Under the lock."""
        while self._has_space_for_waiting():
            for request in _pop(self._waiting_remote, 1):  # none, if the queue is closed meanwhile
                if request.receiver.done():
                    self._drop([request])
                elif self.admission.pauses:
                    set_exceptions([request], [self.admission.reject_paused()])
                else:
                    self._append(request)
                    if self._stray:
                        self._redirect_one(request)

    def full(self, rows: int = 1) -> bool:
        """Whether the queue has no space now for so many rows; more than it may ever have find space while none is."""
        admission = self.admission
        limit = admission.max_pending
        if limit is None or admission.closed is not None or self.released:
            return False
        pending = len(self._requests) + len(self._more_rows)
        pending += sum([transport.claimed() for transport in self.transports])
        return pending > 0 and pending + rows > limit

    def notify(self) -> None:
        """Wake the model thread if it sleeps and what it waits for is there."""
        if (
            self._to_be_woken
            and self._wanted <= (count := len(self._requests) + len(self._more_rows))
            and (not self.wakeups_in_flight or count >= self._enough)
        ):
            try:
                # One call of C code: no signal handler can come in between, and leave the thread asleep for ever.
                list(map(operator.call, self._wake_once))
            except (IndexError, *ALREADY_NOTIFIED):  # another thread was quicker
                pass

    def wake(self) -> None:
        """Make the running ``wait``, or else the next one, return."""
        self.waker.notify()

    def fail(self, transport: Transport, error: BaseException) -> bool:
        """Note that a transport can't be served any more.

        Returns:
            Whether it was the last one: then the model thread dies of ``error``.
        """
        self._failed.append(transport)
        if len(self._failed) < len(self.transports):
            return False
        self._failure = error
        self.wake()
        return True

    # -- the model thread ------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether nothing is pending any more, and nothing will be."""
        return self._closed is not None

    @property
    def closed_error(self) -> ServerClosedError | None:
        """The error of every request once it is closed."""
        return self._closed

    @property
    def is_waited_for(self) -> bool:
        """Whether the model thread sleeps until requests come."""
        return bool(self._to_be_woken)

    def wait(self, at_least: int, enough: int, timeout: float | None) -> int:
        """Block until requests are pending, ``wake`` was called, or ``timeout`` seconds passed.

        Args:
            at_least: how many rows to wait for.
            enough: with so many, don't wait for the callers that the batch before has woken.
            timeout: seconds; ``None`` waits for ever. With 0, all that callers have sent is taken in first.

        Returns:
            How many are pending, those of cancelled requests included.
        """
        if timeout == 0:
            self.read(wait=True)
        elif self._requests and isinstance(self.waker, Selector):
            self.waker.poll()  # it may not sleep, and so not hear itself of requests that were cancelled meanwhile
        self._wanted, self._enough = at_least, enough
        self._to_be_woken.append(True)
        if timeout != 0:
            for pump in self.pumps:
                pump.on_wait()
        pending = len(self._requests) + len(self._more_rows)
        if timeout != 0 and pending < enough and self.wakeups_in_flight:
            self._linger(MOST_LINGER if timeout is None else min(timeout, MOST_LINGER))
        elif pending < at_least:
            self._wake_threads()  # no woken thread is on the way that would
            self._enough = 0  # no caller is waited for now, even if another thread settles requests
            if len(self._requests) + len(self._more_rows) < at_least:
                self.waker.wait(timeout)
        self._to_be_woken.clear()
        if self._failure is not None:
            raise self._failure
        return len(self._requests) + len(self._more_rows)

    def stand_by(self) -> None:
        """Block until ``wake`` was called, whatever is pending; it may return early."""
        self.wait(sys.maxsize, sys.maxsize, None)

    def _linger(self, limit: float) -> None:
        """Wait for the callers that were woken, as long as one after the other runs."""
        deadline = time.perf_counter() + limit
        while True:
            left = len(self.wakeups_in_flight)
            if self.waker.wait(min(LINGER, limit)):
                return
            limit = deadline - time.perf_counter()
            if len(self.wakeups_in_flight) >= left or limit <= 0:
                self.wakeups_in_flight.clear()
                self._wake_threads()
                return

    def _wake_threads(self) -> None:
        for sink in self.thread_sinks:
            sink.wake_all()

    def oldest(self, now: float) -> float:
        """When the oldest pending request was submitted, on the clock of ``time.perf_counter``; ``now`` if none is.

        Another process writes the times of its requests: one that is still to come, or is no number, counts as now.
        """
        try:
            return min(now, self._requests[0].submitted_at)
        except IndexError:
            return now

    def get_batch(self, max_rows: int, *, largest: int | None = None) -> list[Request]:
        """Claim requests in order, as long as they fit; those whose callers went away are dropped and don't count.

        Args:
            max_rows: how many rows at most.
            largest: a request of more rows is split, and its parts are pending in its place; by default
                ``max_batch_size``.
        """
        taken: list[Request] = []
        rows = dropped = 0
        while self._requests and (space := max_rows - rows) > 0:
            if several := bool(self._more_rows):
                some = self._pop_fitting(space, largest or self.max_batch_size)
                if not some:  # the first one does not fit
                    break
            else:
                some = _pop(self._requests, space)
                if several := bool(self._more_rows):  # since the look
                    some = self._put_back_unfitting(some, space)
            if any([request.receiver.done() for request in some]):  # noqa: C419 - faster, and all are false
                cancelled, some = _partition(some)
                dropped += sum([request.rows for request in cancelled])
                self._drop(cancelled)
            taken += some
            rows += sum([request.rows for request in some]) if several else len(some)
        if self._waiting_remote and self._lock.acquire(blocking=False):  # else the thread that has the lock does it
            try:
                self._move_waiting()
            finally:
                self._lock.release()
        if self.not_full:
            self.not_full.notify(rows + dropped)
        return taken

    def _pop_fitting(self, space: int, largest: int) -> list[Request]:
        """Take requests out, in order, as long as they fit; and those before them whose callers went away."""
        popped: list[Request] = []
        while space > 0:
            try:
                first = self._requests[0]
            except IndexError:
                break
            if first.receiver.done():
                if self._remove(first):
                    popped.append(first)
            elif first.rows > largest:
                self._split(first, largest)
            elif first.rows > space:
                break
            elif self._remove(first):
                popped.append(first)
                space -= first.rows
        return popped

    def _put_back_unfitting(self, popped: list[Request], space: int) -> list[Request]:
        """Return those of the requests just taken out that fit; the others are pending again."""
        for index, request in enumerate(popped):
            if request.rows > space:
                self._put_back(popped[index:])
                popped = popped[:index]
                break
            space -= request.rows
        self._more_rows.remove(sum([request.rows - 1 for request in popped]))
        return popped

    def _put_back(self, requests: Sequence[Request]) -> None:
        self._requests.extendleft(reversed(requests))
        if self._stray:
            self._redirect()

    def _split(self, request: Request, max_rows: int) -> None:
        """Replace the first request, which has too many rows, by its parts."""
        try:
            parts = split(request, max_rows)
        except BaseException as error:  # a class of the user's may raise anything
            if self._remove(request):
                self.admission.stats.fail(1)
                set_exceptions([request], [clone_exception(error)])
            return
        if _remove(self._requests, request):
            self._put_back(parts)
            self._more_rows.remove(len(parts) - 1)

    def _drop(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.sink.discard(request.receiver)
            if not request.is_part:
                self.admission.stats.cancel(1)

    async def serve(self) -> None:
        """Read what other processes send where requests must be refused while the model is busy."""
        selector = self.waker
        while isinstance(selector, Selector) and self.admission.max_pending is not None:
            await anyio.wait_readable(selector.fileno())
            selector.poll()
            self.notify()  # the model thread does not hear of what another thread has read

    # -- pausing and closing ---------------------------------------------------------------------------

    def pause(self, pause: object) -> None:
        """Refuse every request until :meth:`resume` was called for each pause that was given."""
        self.admission.pauses.add(pause)
        self._publish()

    def resume(self, pause: object) -> None:
        """Undo a :meth:`pause`; idempotent."""
        self.admission.pauses.discard(pause)
        self._publish()

    def refuse(self, error: ServerClosedError) -> None:
        """Refuse every request from now on; pending ones are still served."""
        self.admission.closed = error
        self._publish()

    def close(self, error: ServerClosedError) -> None:
        """Refuse every request from now on, and fail what is pending. Idempotent."""
        self.refuse(error)
        if self._closed is None:  # after the refusal: what is sent later finds the queue closed
            self._each(lambda transport: transport.read())
        self._closed = error
        self._stray = True
        self._redirect()
        self.not_full.notify()
        self._wake_threads()
        self._each(lambda transport: transport.close(error))

    def detach(self, error: ServerClosedError) -> None:
        """Close, fail what has no answer yet, and let the transports flush: no thread serves them any more."""
        self.close(error)
        self._each(lambda transport: transport.detach(error))

    def start(self) -> None:
        """A model thread begins to serve."""
        for transport in self.transports:
            transport.start()

    def read(self, *, wait: bool = False) -> None:
        """Take in what callers have sent until now; with ``wait``, also what takes a moment to be had."""
        for transport in tuple(self.transports):
            transport.read(wait=wait)

    def _publish(self) -> None:
        self._each(lambda transport: transport.on_admission())

    def _each(self, do: Callable[[Transport], None]) -> None:
        """Have each transport do something; what one raises is logged, and keeps no other from it."""
        interrupted: BaseException | None = None
        for transport in tuple(self.transports):
            try:
                do(transport)
            except Exception:
                _log.exception("a %s could not be read, paused or closed", type(transport).__qualname__)
            except BaseException as error:  # of a signal handler, mostly
                interrupted = error
        if interrupted is not None:
            try:
                raise interrupted
            finally:
                del interrupted  # its traceback leads here: it must not lead back

    def _fail_all(self, error: ServerClosedError) -> None:
        for queue in (self._requests, self._waiting_remote):
            popped = _pop(queue, len(queue))
            if queue is self._requests:
                self._more_rows.remove(sum([request.rows - 1 for request in popped]))
            cancelled, live = _partition(popped)
            self._drop(cancelled)
            self.admission.stats.fail(sum(not request.is_part for request in live))
            set_exceptions(live, [clone_exception(error) for _ in live])


def _uninterrupted(action: Callable[[], None], name: str) -> None:
    """Do something where no signal handler interrupts it: handlers run on the main thread."""
    if threading.current_thread() is threading.main_thread():
        run_in_thread(action, name).result()
    else:
        action()


def call_uninterrupted(*calls: Callable[[], object]) -> None:
    """Call functions of C, one after the other, so that no signal handler and no other thread runs in between."""
    list(map(operator.call, calls))


def _pop(queue: deque[Request], count: int) -> list[Request]:
    """Take up to ``count`` requests out, in order; other threads may do so at the same time."""
    popped: list[Request] = []
    try:
        popped.extend(starmap(queue.popleft, repeat((), min(count, len(queue)))))
    except IndexError:
        pass
    return popped


def _remove(queue: deque[Request], request: Request) -> bool:
    """Take one request out; return whether it was there, and not taken by another thread."""
    try:
        queue.remove(request)
    except ValueError:
        return False
    return True


def _partition(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Split into requests whose callers went away, and the others."""
    parts: tuple[list[Request], list[Request]] = ([], [])
    for request in requests:
        parts[not request.receiver.done()].append(request)
    return parts


_queues: weakref.WeakSet[RequestQueue] = weakref.WeakSet()


def _forget_parent() -> None:
    for queue in list(_queues):
        queue.forget_parent()


os.register_at_fork(after_in_child=_forget_parent)
