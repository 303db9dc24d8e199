"""How requests of many callers reach the server: straight into the queue of one in this process, or by its clients."""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

from tensordict import TensorDictBase

from aioinfer.batching import Caller
from aioinfer.errors import ClientClosedError, InvalidRequestError, ServerOverloadedError
from aioinfer.interaction_type import Mode, requests_carry
from aioinfer.server import InferenceServer
from aioinfer.transports import ThreadingTransport
from aioinfer.transports.network.messages import Payload
from aioinfer.transports.replies import ReplySink
from aioinfer.transports.request import NamedRequest, Request
from aioinfer.web.backend import Backend, PendingReply

__all__ = ["Asked", "Submission", "submission_to", "tells_callers"]

_RETRY_AFTER = 0.005  # seconds


class Receiver(Protocol):
    """Takes the outcome of a request."""

    def done(self) -> bool:
        """Whether nobody waits for it any more. Any thread."""
        ...


class Asked(NamedTuple):
    """A request.

    Attributes:
        payload: what is asked.
        receiver: takes the outcome.
        mode: the exploration mode.
        wait: whether it waits for space where the queue is full.
        caller: who makes one after the other, if that is known; see :func:`tells_callers`.
    """

    payload: Payload
    receiver: Receiver
    mode: Mode
    wait: bool
    caller: Caller | None


Settle: TypeAlias = Callable[[Sequence[Any], Sequence[TensorDictBase | Exception]], None]
"""Takes receivers, and a reply or an error for each, on the event loop."""


class Submission(ABC):
    """Hands requests to the server. Loop thread only.

    Args:
        settle: takes what comes back.
    """

    def __init__(self, settle: Settle) -> None:
        self._settle = settle

    @abstractmethod
    def submit(self, asked: Sequence[Asked]) -> None:
        """Ask; returns at once. The receivers of those that the server refuses are settled."""

    @abstractmethod
    def cancel(self, receiver: Any) -> None:
        """A receiver is done: its request need not be computed any more."""

    @property
    def least_seconds(self) -> float:
        """Seconds from when a batch takes a request to its reply, at least; 0 if that is not known."""
        return 0.0

    def withdraw(self, receiver: Any) -> bool:
        """Take the request of a receiver back, if it is certain that no batch has taken it; return whether."""
        return False

    def count_rejections(self, count: int) -> None:
        """Note that so many requests were refused by the caller's process, where the server counts them."""
        return


def submission_to(backend: Backend, settle: Settle) -> Submission:
    """The fastest way to a server: to put requests into its queue, where its tasks put theirs."""
    transport = _transport_with_queue(backend)
    return _ClientSubmission(backend, settle) if transport is None else _QueueSubmission(transport, settle)


def tells_callers(backend: Backend) -> bool:
    """Whether a server learns who makes the requests that a submission hands to it."""
    return _transport_with_queue(backend) is not None


def _transport_with_queue(backend: Backend) -> ThreadingTransport | None:
    if isinstance(backend.server, InferenceServer):
        for transport in backend.server.transports:
            if isinstance(transport, ThreadingTransport):
                return transport
    return None


class _QueueSubmission(Submission, ReplySink):
    """Puts requests into the queue of a server in this process. It is the sink of their replies."""

    def __init__(self, transport: ThreadingTransport, settle: Settle) -> None:
        super().__init__(settle)
        self.transport = transport
        self._loop = asyncio.get_running_loop()

    def submit(self, asked: Sequence[Asked]) -> None:
        queue = self.transport.queue
        admission = queue.admission
        now = time.perf_counter()
        together: list[Request] = []
        for payload, receiver, mode, wait, caller in asked:
            try:
                batched = admission.check(payload)
            except RecursionError:
                self._settle([receiver], [InvalidRequestError("the entries are nested too deeply")])
                continue
            except Exception as error:
                self._settle([receiver], [error])
                continue
            if caller is not None:
                caller.asked_at = now
            request = (
                NamedRequest(payload, admission.batch_size, receiver, self, now, mode, caller)
                if type(payload) is dict
                else Request(payload, receiver, self, now, mode, caller)  # type: ignore[arg-type]
            )
            if batched:
                request.set_rows()
            if wait:
                queue.put_remote(request, wait=True)
            else:
                together.append(request)
        queue.put_remote_all(together)
        queue.notify()

    def cancel(self, receiver: Any) -> None:
        pass  # the queue drops requests whose receivers are done

    @property
    def least_seconds(self) -> float:
        return min(tuple(self.transport.queue.pass_seconds), default=0.0)

    def withdraw(self, receiver: Any) -> bool:
        return self.transport.queue.withdraw(receiver)

    def count_rejections(self, count: int) -> None:
        self.transport.queue.admission.stats.reject(count)

    def set_results(self, receivers: Sequence[Any], replies: Sequence[TensorDictBase]) -> None:
        self._call_soon(receivers, replies)

    def set_exceptions(self, receivers: Sequence[Any], errors: Sequence[Exception]) -> None:
        self._call_soon(receivers, errors)

    def _call_soon(self, receivers: Sequence[Any], outcomes: Sequence[Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._settle, receivers, outcomes)
        except RuntimeError:  # the loop is closed, and the connection with it
            pass


class _ClientSubmission(Submission):
    """Asks by clients of the server."""

    def __init__(self, backend: Backend, settle: Settle) -> None:
        super().__init__(settle)
        self._backend = backend
        self._under_way: dict[Any, PendingReply | asyncio.Task[TensorDictBase]] = {}

    def submit(self, asked: Sequence[Asked]) -> None:
        for one in asked:
            try:
                self._submit(one)
            except RecursionError:
                self._settle([one.receiver], [InvalidRequestError("the entries are nested too deeply")])
            except Exception as error:
                self._settle([one.receiver], [error])

    def _submit(self, one: Asked) -> None:
        if one.wait:
            task = asyncio.create_task(self._ask_until_taken(one))
            self._under_way[one.receiver] = task
            task.add_done_callback(partial(self._done, one.receiver, None))
        else:
            pending = self._ask(one)
            self._under_way[one.receiver] = pending
            pending.future.add_done_callback(partial(self._done, one.receiver, pending))

    def _ask(self, one: Asked) -> PendingReply:
        with requests_carry(one.mode):  # type: ignore[arg-type]
            # Who asks keeps the deadlines.
            return self._backend.submit(one.payload, time.perf_counter(), deadline=math.inf)

    async def _ask_until_taken(self, one: Asked) -> TensorDictBase:
        """Ask until the queue has space, instead of waiting for it: a mode is in force between two awaits only."""
        while True:
            pending = self._ask(one)
            try:
                return await pending.reply()
            except ServerOverloadedError:
                await asyncio.sleep(_RETRY_AFTER)
            finally:
                self._backend.finish(pending)

    def _done(self, receiver: Any, pending: PendingReply | None, future: asyncio.Future[TensorDictBase]) -> None:
        self._under_way.pop(receiver, None)
        if pending is not None:
            self._backend.finish(pending)
        error: BaseException | None
        if future.cancelled():
            if receiver.done():
                return
            error = pending.error if pending is not None else None
            error = error or ClientClosedError("the request was withdrawn")
        else:
            error = future.exception()
        self._settle([receiver], [error if isinstance(error, Exception) else future.result()])

    def cancel(self, receiver: Any) -> None:
        pending = self._under_way.pop(receiver, None)
        if pending is not None:
            pending.cancel()
