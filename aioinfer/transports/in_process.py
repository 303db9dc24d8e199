"""What the transports inside one process have in common: one wake-up per batch and event loop, and their clients."""

from __future__ import annotations

import asyncio
import weakref
from abc import abstractmethod
from functools import partial
from typing import NoReturn

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.transports.admission import REFUSALS
from aioinfer.transports.outlets import LoopOutlet
from aioinfer.transports.pending import PendingQueue
from aioinfer.transports.queued import QueuedTransport

__all__ = ["InProcessAsyncClient", "InProcessClient", "InProcessTransport"]


class InProcessTransport(QueuedTransport):
    """Base of the transports whose callers share the server's memory. Not a transport itself: it has no ``submit``."""

    def __init__(self) -> None:
        super().__init__()
        self._outlets: weakref.WeakValueDictionary[int, LoopOutlet] = weakref.WeakValueDictionary()

    def _outlet(self) -> LoopOutlet:
        """The one outlet of the running event loop; it lives while a client or a request uses it."""
        loop = asyncio.get_running_loop()
        outlet = self._outlets.get(id(loop))  # which no other thread asks for
        if outlet is None:
            outlet = self._outlets[id(loop)] = LoopOutlet(loop, self._queue.waking, self._queue.ring)
        return outlet


class InProcessClient(InferenceClient):
    """Base of the blocking clients."""

    def __reduce__(self) -> NoReturn:
        raise _does_not_travel()


class InProcessAsyncClient(AsyncInferenceClient):
    """Base of the awaitable clients: all but the way in which a request gets into the queue."""

    _queue: PendingQueue

    def __reduce__(self) -> NoReturn:
        raise _does_not_travel()

    @abstractmethod
    def _put(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        """Do as ``submit``; raise what the server refuses."""

    def submit(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        try:
            return self._put(td)
        except REFUSALS as error:
            refused: asyncio.Future[TensorDictBase] = asyncio.get_running_loop().create_future()
            refused.set_exception(error.with_traceback(None))
            return refused

    async def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:  # noqa: ASYNC109
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self(td, wait=wait)
        return await (await self._queue.room.async_put(partial(self._put, td)) if wait else self._put(td))


def _does_not_travel() -> TypeError:
    return TypeError(
        "a client of a ThreadingTransport or a SlotTransport is for the process in which it was made; give the server "
        "an MPTransport or a ProcessSlotTransport, and hand clients of that to other processes"
    )
