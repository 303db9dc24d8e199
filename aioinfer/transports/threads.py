"""Callers of this process: any number of threads, and of tasks on any event loops."""

from __future__ import annotations

import asyncio

from tensordict import TensorDictBase

from aioinfer.client import CLOSED, AsyncInferenceClient, InferenceClient
from aioinfer.futures import Future
from aioinfer.transports.admission import REFUSALS
from aioinfer.transports.in_process import InProcessAsyncClient, InProcessClient, InProcessTransport
from aioinfer.transports.outlets import FUTURES, LoopOutlet
from aioinfer.transports.sleepers import Waiter, unwrap
from aioinfer.wakers import LockWaker

__all__ = ["ThreadingTransport"]


class ThreadingTransport(InProcessTransport):
    """Callers of this process: any number of threads, and of tasks on any event loops, all at once.

    The right choice unless a reason speaks for another. Clients are cheap, and may be shared.
    """

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        future: Future[TensorDictBase] = Future()
        try:
            self._queue.put(td, future, FUTURES)
            self._queue.ring()
        except REFUSALS as error:
            future.set_exception(error.with_traceback(None))
        except BaseException:
            future.cancel()
            raise
        return future

    def client(self, *, copy: bool = True) -> InferenceClient:
        return _ThreadClient(self)

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        return _TaskClient(self)


class _ThreadClient(InProcessClient):
    def __init__(self, transport: ThreadingTransport) -> None:
        self._transport = transport
        self._queue = transport._queue

    def close(self) -> None:
        self._transport = self._queue = CLOSED

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        return self._transport.submit(td)

    def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:
        queue = self._queue
        waiter = Waiter(queue.sleepers, LockWaker())
        try:
            if wait:
                timeout = queue.put_when_room(td, waiter, queue.sleepers, timeout)
            else:
                queue.put(td, waiter, queue.sleepers)
            queue.ring()
            outcome = waiter.wait(timeout)
        except BaseException:
            waiter.abandon()
            raise
        try:
            return unwrap(*outcome)
        finally:
            del outcome  # the traceback of an error leads here: it must not lead back


class _TaskClient(InProcessAsyncClient):
    def __init__(self, transport: ThreadingTransport) -> None:
        self._transport = transport
        self._queue = transport._queue
        self._outlet: LoopOutlet | None = None  # that of the loop which used this client last

    def close(self) -> None:
        self._transport = self._queue = CLOSED

    def _put(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        outlet = self._outlet
        if outlet is None or not outlet.runs_here():
            outlet = self._outlet = self._transport._outlet()
        future: asyncio.Future[TensorDictBase] = outlet.loop.create_future()
        self._queue.put(td, future, outlet)
        outlet.ring_at_end_of_tick()
        return future
