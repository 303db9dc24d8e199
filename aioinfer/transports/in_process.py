"""The server's half of every transport inside one process: a queue, and one wake-up per batch and event loop."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import ServerClosedError, own_error
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.outlets import LoopOutlet
from aioinfer.transports.pending import PendingQueue, Request, answer

__all__ = ["InProcessTransport"]


class InProcessTransport(InferenceTransport):
    """Base of the transports whose callers share the server's memory. Not a transport itself: it has no ``submit``."""

    def __init__(self) -> None:
        self._queue = PendingQueue()
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

    # -- the five verbs, but for submit ----------------------------------------------------------------

    def wait_for_work(self, timeout: float) -> None:
        self._queue.wait(1, 1, timeout)

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        requests = self._queue.take(max_items)
        return [request.td for request in requests], requests

    def resolve(self, callback: Request, result: TensorDictBase) -> None:
        answer([callback], [result], failed=False)

    def resolve_exception(self, callback: Request, exc: BaseException) -> None:
        answer([callback], [own_error(exc)], failed=True)

    # -- batch-wise verbs ------------------------------------------------------------------------------

    def open(self, admission: Admission) -> None:
        self._queue.open(admission)

    def close(self, error: ServerClosedError) -> None:
        self._queue.close(error)

    def finish(self, error: ServerClosedError) -> None:
        self._queue.close(error)

    def wake(self) -> None:
        self._queue.wake()

    def pending(self) -> int:
        return len(self._queue)

    def wait_for_pending(self, at_least: int, enough: int, timeout: float | None) -> int:
        return self._queue.wait(at_least, enough, timeout)

    def waited(self) -> float:
        return self._queue.waited()

    def take(self, max_items: int) -> list[Request]:
        return self._queue.take(max_items)

    def resolve_batch(self, requests: Sequence[Request], replies: Sequence[TensorDictBase]) -> None:
        answer(requests, replies, failed=False)

    def fail_batch(self, requests: Sequence[Request], errors: Sequence[Exception]) -> None:
        answer(requests, errors, failed=True)
