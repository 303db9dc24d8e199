"""The server's half of the transports that keep pending requests in a queue of ours."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase

from aioinfer.errors import ServerClosedError, clone_exception
from aioinfer.ipc.selector import Selector
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import InferenceTransport, ServedTransport
from aioinfer.transports.pending import PendingQueue
from aioinfer.transports.requests import Request, answer
from aioinfer.wakers import LockWaker

__all__ = ["QueuedTransport"]


class QueuedTransport(InferenceTransport, ServedTransport):
    """Base of such transports. Not a transport itself: it has no ``submit``."""

    def __init__(self) -> None:
        self._queue = PendingQueue()

    def join(self, family: Sequence[PendingQueue], poller: Selector, lock: threading.RLock) -> None:
        """Be served by one model thread with other transports, until it is opened again; before anybody waits.

        Args:
            family: the queues of all of them.
            poller: wakes the thread.
            lock: guards their common bound.
        """
        self._queue.join(family, poller, lock)

    def _leave(self) -> None:
        """Be served by a model thread of its own."""
        self._queue.leave(LockWaker())

    # -- the five verbs, but for submit ----------------------------------------------------------------

    def wait_for_work(self, timeout: float) -> None:
        self._queue.wait(1, 1, timeout)

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        requests = self._queue.take(max_items)
        return [request.td for request in requests], requests

    def resolve(self, callback: Request, result: TensorDictBase) -> None:
        answer([callback], [result], failed=False)

    def resolve_exception(self, callback: Request, exc: BaseException) -> None:
        answer([callback], [clone_exception(exc)], failed=True)

    # -- batch-wise verbs ------------------------------------------------------------------------------

    def check_open(self, admission: Admission) -> None:
        self._queue.admission.check_hand_over(admission)

    def open(self, admission: Admission) -> None:
        self.check_open(admission)
        self._queue.open(admission)
        self._leave()

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
