"""Callers of this process: any number of threads, and of tasks on any event loops."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.transports.bells import LockBell
from aioinfer.transports.in_process import InProcessTransport
from aioinfer.transports.outlets import FUTURES, LoopOutlet
from aioinfer.transports.sleepers import Waiter

__all__ = ["ThreadingTransport"]


class ThreadingTransport(InProcessTransport):
    """Callers of this process: any number of threads, and of tasks on any event loops, all at once.

    The right choice unless a reason speaks for another. Clients are cheap, and may be shared.
    """

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        future: Future[TensorDictBase] = Future()
        self._queue.put(td, future, FUTURES)
        self._queue.ring()
        return future

    def client(self) -> InferenceClient:
        return _ThreadClient(self)

    def async_client(self) -> AsyncInferenceClient:
        return _TaskClient(self)


class _ThreadClient(InferenceClient):
    def __init__(self, transport: ThreadingTransport) -> None:
        self._queue = transport._queue
        self._transport = transport

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        return self._transport.submit(td)

    def _call(self, td: TensorDictBase, timeout: float | None) -> TensorDictBase:
        waiter = Waiter(self._queue.sleepers, LockBell())
        self._queue.put(td, waiter, self._queue.sleepers)
        self._queue.ring()
        return waiter.wait(timeout)

    def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:
        return self._queue.room.call(self._call, td, timeout) if wait else self._call(td, timeout)


class _TaskClient(AsyncInferenceClient):
    def __init__(self, transport: ThreadingTransport) -> None:
        self._transport = transport
        self._queue = transport._queue
        self._outlet: LoopOutlet | None = None  # that of the loop which used this client last

    def submit(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        outlet = self._outlet
        if outlet is None or not outlet.runs_here():
            outlet = self._outlet = self._transport._outlet()
        future: asyncio.Future[TensorDictBase] = outlet.loop.create_future()
        self._queue.put(td, future, outlet)
        outlet.ring_at_end_of_tick()
        return future

    async def __call__(self, td: TensorDictBase, *, wait: bool = False) -> TensorDictBase:
        return await (self._queue.room.async_call(self.submit, td) if wait else self.submit(td))
