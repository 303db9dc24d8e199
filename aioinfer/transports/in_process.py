"""What the transports inside one process have in common: one wake-up per batch and event loop, and their clients."""

from __future__ import annotations

import asyncio
import weakref
from typing import NoReturn

from aioinfer.client import InferenceClient
from aioinfer.transports.outlets import LoopOutlet
from aioinfer.transports.pending import PendingQueue
from aioinfer.transports.queued import QueuedTransport
from aioinfer.transports.room import BoundedAsyncClient, RoomQueue

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


class InProcessAsyncClient(BoundedAsyncClient):
    """Base of the awaitable clients."""

    _queue: PendingQueue

    def __reduce__(self) -> NoReturn:
        raise _does_not_travel()

    @property
    def _room(self) -> RoomQueue:
        return self._queue.room


def _does_not_travel() -> TypeError:
    return TypeError(
        "a client of a ThreadingTransport or a SlotTransport is for the process in which it was made; give the server "
        "an MPTransport or a ProcessSlotTransport, and hand clients of that to other processes"
    )
