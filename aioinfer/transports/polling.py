"""Minimal custom transports: five verbs, and the pump that feeds their requests into the server's queue."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

from tensordict import TensorDictBase

from aioinfer.client import CLOSED, AsyncInferenceClient, ClientMaker, InferenceClient, check_count
from aioinfer.entries import RequestLike, make_request
from aioinfer.errors import ServerClosedError, clone_exception, describe
from aioinfer.futures import Future, run_in_thread
from aioinfer.interaction_type import attach_mode, caller_mode, detach_mode
from aioinfer.transports.base import Transport
from aioinfer.transports.queue import (
    REFUSALS,
    RefusableAsyncClient,
    RequestQueue,
    RowCount,
    call_uninterrupted,
    seconds_left,
)
from aioinfer.transports.replies import LockWaker
from aioinfer.transports.request import Request

__all__ = ["InferenceTransport", "PollingTransport"]

# A custom `wait_for_work` can't be interrupted: the pump looks up this often, in seconds, which costs an idle server
# less than 0.1 % of a core.
_POLL_INTERVAL = 0.3
# Seconds for which the model thread waits for the pump at most: longer than a loaded machine takes.
PUMP_LIMIT = 5.0

_log = logging.getLogger("aioinfer")


class InferenceTransport(ClientMaker):
    """Carries requests to a server and replies back.

    To write a transport, subclass this and implement its five verbs; nothing else is needed, not even
    ``super().__init__()``, and no other name is taken but the makers of clients. It then works with
    :class:`~aioinfer.InferenceServer`, alone or in a list of transports, and with both clients.
    ``aioinfer.testing.check_transport`` runs the contract's tests over it.
    """

    # -- the five verbs --------------------------------------------------------------------------------

    @abstractmethod
    def submit(self, td: TensorDictBase) -> concurrent.futures.Future[TensorDictBase]:
        """Enqueue one request (any thread).

        Returns:
            A future that resolves to the output TensorDict: of ``concurrent.futures``, or one that
            behaves as it (``result(timeout)``, ``exception``, ``done``, ``cancel``,
            ``add_done_callback``).
        """

    @abstractmethod
    def wait_for_work(self, timeout: float) -> None:
        """Block until a request is pending, or ``timeout`` seconds passed (server side)."""

    @abstractmethod
    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        """Take up to ``max_items`` pending requests, without blocking (server side).

        Returns:
            The requests, and for each an opaque handle that ``resolve`` understands.
        """

    @abstractmethod
    def resolve(self, callback: Any, result: TensorDictBase) -> None:
        """Answer one request (server side). May raise if its caller is gone."""

    @abstractmethod
    def resolve_exception(self, callback: Any, exc: BaseException) -> None:
        """Fail one request (server side). May raise if its caller is gone."""

    # -- clients ---------------------------------------------------------------------------------------

    def client(self, *, copy: bool = True) -> InferenceClient:
        return _Client(self._aioinfer_transport)

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        return _AsyncClient(self._aioinfer_transport)

    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        return _make(count, self.client if copy else lambda: self.client(copy=False))

    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        return _make(count, self.async_client if copy else lambda: self.async_client(copy=False))

    # Made when it is first asked for, since a subclass need not call __init__.
    @cached_property
    def _aioinfer_transport(self) -> PollingTransport:
        return PollingTransport(self)


def _make(count: int, make: Any) -> list[Any]:
    check_count(count)
    made: list[Any] = []
    try:
        for _ in range(count):
            made.append(make())  # noqa: PERF401 - what was made is closed if the next can't be
    except BaseException:
        for client in made:
            client.close()
        raise
    return made


class PollingTransport(Transport):
    """Serves the five verbs of a custom transport, and calls nothing else of it. It is the sink of its replies, too.

    A pump thread waits for work and drains it into the server's queue when the model thread waits for requests: until
    then they stay where their callers can cancel them. What ``wait_for_work`` and ``drain`` raise ends the service of
    this transport by name, and the server only if it has no other transport. What ``resolve`` and
    ``resolve_exception`` raise costs that request its answer, and no other.

    Any thread: ``submit``, ``held``, ``read``, and what a server calls. Pump thread only: ``_drain``.

    Args:
        verbs: the custom transport.
    """

    def __init__(self, verbs: InferenceTransport) -> None:
        super().__init__()
        self._verbs = verbs
        # Requests of our clients that have no answer. The queue's lock guards how many of them count as pending.
        self._futures: set[concurrent.futures.Future[TensorDictBase]] = set()
        self._claims: dict[object, int] = {}  # rows of these requests, and of those on their way into the transport
        self._submitted_rows = RowCount()  # of their requests
        self._drained_rows = RowCount()  # of those of them that are in the queue or in a batch
        # For each thread that settles a request, its rows, which the request's future takes if it is done meanwhile.
        self._settling: dict[int, list[int]] = {}
        self._error: ServerClosedError | None = None
        self._pump: Future[None] | None = None
        self._last_drained: RequestQueue | None = None  # the closed queue into which no pump drains any more
        self._pump_is_ready = False  # it has waited for work, and does not drain yet
        self._pump_has_ended = [True]  # an element once it drains no more, whoever waits for that; a list for each pump
        self._turn = LockWaker()  # wakes the pump: the model thread waits, or a reader does
        self._readers: deque[LockWaker] = deque()

    @property
    def transport(self) -> PollingTransport:
        """The transport by which the requests came: this one."""
        return self

    # -- callers ---------------------------------------------------------------------------------------

    def submit(self, td: Any) -> concurrent.futures.Future[TensorDictBase]:
        """Check a request, count it against ``max_pending``, and submit it; raise what refuses it."""
        queue = self.queue
        batched = queue.admission.check(td)
        if type(td) is dict:
            td = queue.admission.make_td(td)
        rows = td.batch_size[0] if batched else 1
        if self._error is not None:
            raise clone_exception(self._error)
        if rows == 0:
            queue.admission.stats.succeed(1)
            empty: Future[TensorDictBase] = Future()
            empty.set_result(queue.admission.empty_reply())
            return empty
        claim = object()
        try:
            if not queue.reserve(rows, partial(self._claims.__setitem__, claim, rows)):
                raise queue.admission.reject_overloaded()
            future = self._verbs.submit(attach_mode(td, caller_mode()))
            self._submitted_rows.add(rows)
            self._futures.add(future)
        except BaseException:
            if self._claims.pop(claim, None) is not None:
                queue.not_full.notify(rows)
            raise
        future.add_done_callback(partial(self._on_done, claim, rows))
        error = self._error or (queue.closed_error if self._last_drained is queue else None)
        if error is not None:
            _fail(future, error)
        return future

    def _on_done(self, claim: object, rows: int, future: concurrent.futures.Future[TensorDictBase]) -> None:
        settled = self._settling.get(threading.get_ident())
        drained = settled.pop() if settled else 0
        # One step, so that it counts until it is done, and nothing else counts less then.
        call_uninterrupted(
            self._submitted_rows.removing(rows),
            partial(self._claims.pop, claim, None),
            self._drained_rows.removing(drained),
        )
        self._futures.discard(future)
        if not drained:  # it counted after its pass, or had none, and nobody was told that it does no more
            self.queue.not_full.notify(rows)

    def closed_error(self) -> Exception | None:
        """The error for a caller whose future was cancelled because the server closed."""
        error = self._error
        return None if error is None else clone_exception(error)

    # -- hooks for the server --------------------------------------------------------------------------

    def attach(self, queue: RequestQueue) -> None:
        self._error = None
        queue.pumps.append(self)
        super().attach(queue)

    def start(self) -> None:
        self._readers.clear()
        self._pump_has_ended = []
        self._pump = run_in_thread(partial(self._run, self.queue, self._pump_has_ended), "aioinfer-pump")

    def held(self) -> int:
        # Too low by the drained requests whose callers have cancelled them since.
        drained = len(self._drained_rows)  # first: what is done before the next look counts too little, not too much
        return max(0, len(self._submitted_rows) - drained)

    def claimed(self) -> int:
        drained = len(self._drained_rows)
        return max(0, sum(self._claims.values()) - drained)

    def read(self, *, wait: bool = False) -> None:
        if wait and self.held() and not self._pump_has_ended:
            self._wait_for_pump()

    def on_wait(self) -> None:
        """The model thread waits for requests now (model thread)."""
        self._turn.notify()
        if self._pump_is_ready:  # else it may be a while until there is work, and the pump wakes the model thread then
            self._wait_for_pump()

    def _wait_for_pump(self) -> None:
        late = bool(self._readers)  # then the transport blocks for longer than it was told
        self._readers.append(done := LockWaker())
        self._turn.notify()
        if not (late or self._pump_has_ended):
            done.wait(PUMP_LIMIT)

    def forget_parent(self) -> None:
        self._futures.clear()
        self._claims.clear()
        self._submitted_rows.clear()
        self._drained_rows.clear()
        self._settling.clear()
        self._readers.clear()
        self._pump, self._pump_is_ready, self._pump_has_ended, self._turn = None, False, [True], LockWaker()

    def detach(self, error: ServerClosedError) -> None:
        if self._pump is not None:
            self._turn.notify()
            with suppress(TimeoutError):  # where the transport blocks for longer than it was told
                self._pump.exception(4 * _POLL_INTERVAL)
        self._fail_all(error)

    def _fail_all(self, error: ServerClosedError) -> None:
        try:
            while callbacks := self._verbs.drain(1024)[1]:
                for callback in callbacks:
                    self._fail_callback(callback, clone_exception(error))
        except BaseException:
            _log.exception("%s could not hand out what is pending", type(self._verbs).__qualname__)
        self._error = error
        for future in tuple(self._futures):
            _fail(future, error)

    # -- the pump --------------------------------------------------------------------------------------

    def _run(self, queue: RequestQueue, has_ended: list[bool]) -> None:
        readers: list[LockWaker] = []
        try:
            while not queue.closed:
                self._verbs.wait_for_work(_POLL_INTERVAL)
                self._pump_is_ready = True
                while not (queue.is_waited_for or self._readers or queue.closed):
                    self._turn.wait(_POLL_INTERVAL)
                self._pump_is_ready = False
                readers = [self._readers.popleft() for _ in range(len(self._readers))]
                self._drain_rows(queue, self.held() if readers else 0)
                for reader in readers:
                    reader.notify()
            self._last_drained = queue  # who submits from now on fails the request
            self._drain_rows(queue, len(self._submitted_rows))  # which fails them
        except BaseException as error:  # also SystemExit: it must not end the thread unnoticed
            died = ServerClosedError(f"the server's transport died of {describe(error)}")
            died.__cause__ = error
            if not queue.fail(self, error):
                _log.exception("a %s is served no more", type(self._verbs).__qualname__)
                self._fail_all(died)
        finally:
            has_ended.append(True)  # first: a reader that comes later looks
            for reader in (*readers, *self._readers):
                reader.notify()

    def _drain_rows(self, queue: RequestQueue, rows: int) -> None:
        """Move a batch of requests into the queue, or so many rows, if more: callers may go on submitting meanwhile."""
        while (count := self._drain(queue)) and (rows := rows - count) > 0:
            pass

    def _drain(self, queue: RequestQueue) -> int:
        """Move pending requests into the queue; return how many rows there were."""
        inputs, callbacks = self._verbs.drain(queue.max_batch_size)
        now = time.perf_counter()
        requests: list[Request] = []
        for td, callback in zip(inputs, callbacks, strict=True):
            try:
                td, mode = detach_mode(td)
                request = Request(td, _Receiver(callback), self, now, mode)
                if td.batch_size != queue.admission.batch_size and queue.admission.check_layout(td):
                    request.set_rows()
                    request.receiver.rows = request.rows
            except BaseException as error:  # of what is no TensorDict, say
                self._fail_callback(callback, clone_exception(error))
            else:
                requests.append(request)
        rows = sum(request.rows for request in requests)
        queue.put_reserved(requests, self._drained_rows.adding(rows))
        return rows + len(inputs) - len(requests)

    # -- replies ---------------------------------------------------------------------------------------

    def set_results(self, receivers: Sequence[_Receiver], replies: Sequence[TensorDictBase]) -> None:
        for receiver, reply in zip(receivers, replies, strict=True):
            with self._forgetting_drained(receiver):
                try:
                    self._verbs.resolve(receiver.callback, reply)
                except BaseException as error:
                    self._fail_callback(receiver.callback, clone_exception(error))

    def set_exceptions(self, receivers: Sequence[_Receiver], errors: Sequence[Exception]) -> None:
        for receiver, error in zip(receivers, errors, strict=True):
            with self._forgetting_drained(receiver):
                self._fail_callback(receiver.callback, error)

    def discard(self, receiver: _Receiver) -> None:
        with self._forgetting_drained(receiver):
            self._fail_callback(receiver.callback, CancelledError())  # the transport may keep something for it

    @contextmanager
    def _forgetting_drained(self, receiver: _Receiver) -> Iterator[None]:
        """Count a request as drained until its future is done, if that is inside the block, or else until its end.

        Who has a reply finds its request counted no more, though callbacks of its future are still to run.
        """
        thread = threading.get_ident()
        outer = self._settling.get(thread)  # a callback of that one's future has brought us here
        self._settling[thread] = settled = [receiver.rows]
        try:
            yield
        finally:
            if outer is None:
                del self._settling[thread]
            else:
                self._settling[thread] = outer
            self._drained_rows.remove(sum(settled))

    def _fail_callback(self, callback: Any, error: Exception) -> None:
        try:
            self._verbs.resolve_exception(callback, error)
        except BaseException:  # its caller cancelled it, most likely; in no case may it cost the others their replies
            _log.debug("%s could not fail a request", type(self._verbs).__qualname__, exc_info=True)


class _Receiver:
    """The opaque handle of one request; whether its caller went away can be seen where it is a future."""

    __slots__ = ("callback", "rows")

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.rows = 1

    def done(self) -> bool:
        return isinstance(self.callback, concurrent.futures.Future) and self.callback.done()


def _fail(future: Any, error: ServerClosedError) -> None:
    """End a future; one that only behaves as a standard future can at least be cancelled."""
    try:
        if isinstance(future, concurrent.futures.Future):
            future.set_exception(clone_exception(error))
        else:
            future.cancel()
    except concurrent.futures.InvalidStateError:  # it was settled meanwhile
        pass
    except BaseException:  # of a callback, or of a foreign future: the others are to end all the same
        _log.exception("the future of a request could not be ended")


class _Client(InferenceClient):
    """Blocks on the transport's future."""

    def __init__(self, transport: PollingTransport) -> None:
        self._transport = transport

    def close(self) -> None:
        self._transport = CLOSED

    def submit(self, td: RequestLike | None = None, **entries: Any) -> concurrent.futures.Future[TensorDictBase]:
        td = make_request(td, entries)
        try:
            return self._transport.submit(td)
        except REFUSALS as error:
            refused: Future[TensorDictBase] = Future()
            refused.set_exception(error.with_traceback(None))
            return refused

    def __call__(
        self, td: RequestLike | None = None, timeout: float | None = None, *, wait: bool = False, **entries: Any
    ) -> TensorDictBase:
        td = make_request(td, entries)
        transport = self._transport
        put = partial(transport.submit, td)
        deadline = None if timeout is None else time.monotonic() + timeout
        future = transport.put_when_not_full(td, put, deadline) if wait else put()
        try:
            return future.result(seconds_left(deadline))
        except CancelledError:
            raise transport.closed_error() or CancelledError from None
        except BaseException:
            future.cancel()  # nothing happens if it is the future that raised
            raise


class _AsyncClient(RefusableAsyncClient):
    """Copies the transport's future into one of the running loop."""

    _transport: PollingTransport

    def __init__(self, transport: PollingTransport) -> None:
        self._transport = transport

    def close(self) -> None:
        self._transport = CLOSED

    def _put(self, td: Any) -> asyncio.Future[TensorDictBase]:
        loop, transport = asyncio.get_running_loop(), self._transport
        there = transport.submit(td)
        here: asyncio.Future[TensorDictBase] = loop.create_future()

        def settle() -> None:
            if here.done():
                return
            error = transport.closed_error() if there.cancelled() else there.exception()
            if error is None and there.cancelled():
                here.cancel()
            elif error is not None:
                here.set_exception(error)
            else:
                here.set_result(there.result())

        def on_done_there(_: object) -> None:
            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:  # the loop is closed, and its tasks with it
                pass

        def on_done_here(_: object) -> None:
            if here.cancelled():
                there.cancel()

        there.add_done_callback(on_done_there)
        here.add_done_callback(on_done_here)
        return here
