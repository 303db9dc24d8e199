"""The server's half of every transport inside one process: one wake-up per batch and event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref

from aioinfer.transports.outlets import LoopOutlet
from aioinfer.transports.queued import QueuedTransport

__all__ = ["InProcessTransport"]


class InProcessTransport(QueuedTransport):
    """Base of the transports whose callers share the server's memory. Not a transport itself: it has no ``submit``."""

    def __init__(self) -> None:
        super().__init__()
        self._outlets: weakref.WeakValueDictionary[int, LoopOutlet] = weakref.WeakValueDictionary()
        self._outlets_lock = threading.Lock()

    def _outlet(self) -> LoopOutlet:
        """The one outlet of the running event loop; it lives while a client or a request uses it."""
        loop = asyncio.get_running_loop()
        with self._outlets_lock:
            outlet = self._outlets.get(id(loop))
            if outlet is None:
                outlet = self._outlets[id(loop)] = LoopOutlet(loop, self._queue.waking, self._queue.ring)
            return outlet
