"""Several transports under one server: tasks, threads and processes meet in one batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tensordict import TensorDictBase

from aioinfer.errors import ServerClosedError
from aioinfer.ipc.selector import Selector
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import InferenceTransport, ServedTransport
from aioinfer.transports.pending import PendingQueue
from aioinfer.transports.processes import ProcessTransport, watch
from aioinfer.transports.queued import QueuedTransport
from aioinfer.transports.requests import Request, answer
from aioinfer.wakers import LockWaker

__all__ = ["JoinedTransport"]


class JoinedTransport(ServedTransport):
    """What ``InferenceServer(model, [a, b])`` makes of its transports: one that is all of them.

    The model thread waits for all of them at once, and takes what has waited longest, so that requests of one batch
    may have come by unlike ways. ``max_pending`` bounds all of them together.

    Args:
        transports: those of this package; each belongs to one server.

    Raises:
        TypeError: one of them has only the five verbs, and can't be waited for beside others.
        ValueError: none at all, or one twice.
    """

    def __init__(self, transports: Sequence[InferenceTransport]) -> None:
        if not transports or len(set(map(id, transports))) < len(transports):
            raise ValueError("expected at least one transport, and none twice")
        self._transports: list[QueuedTransport] = []
        for transport in transports:
            if not isinstance(transport, InferenceTransport):
                raise TypeError(f"transport must be an InferenceTransport, got {type(transport).__qualname__}")
            if not isinstance(transport, QueuedTransport):
                raise TypeError(
                    f"a {type(transport).__qualname__} can't share a server with other transports: its five verbs "
                    "can't be waited for beside others; give it a server of its own"
                )
            self._transports.append(transport)
        self._family = [transport._queue for transport in self._transports]
        self._processes = [transport for transport in self._transports if isinstance(transport, ProcessTransport)]
        self._poller = Selector()

    def check_open(self, admission: Admission) -> None:
        for transport in self._transports:
            transport.check_open(admission)

    def open(self, admission: Admission) -> None:
        self.check_open(admission)
        opened: list[QueuedTransport] = []
        try:
            for transport in self._transports:
                transport.open(admission)
                opened.append(transport)
        except BaseException:  # its address is taken, say
            for transport in opened:
                transport.close(ServerClosedError("the server could not open all of its transports"))
            raise
        lock = threading.RLock()
        for transport in self._transports:  # last, when nothing can fail any more
            transport.join(self._family, self._poller, lock)

    def close(self, error: ServerClosedError) -> None:
        for transport in self._transports:
            transport.close(error)

    def finish(self, error: ServerClosedError) -> None:
        for transport in self._transports:
            transport.finish(error)

    def wake(self) -> None:
        self._transports[0].wake()

    async def attend(self) -> None:
        pollers = set().union(*[transport.pollers() for transport in self._processes])

        def look() -> None:
            for transport in self._processes:
                transport.look()

        await watch(pollers, look)

    def callers(self) -> int | None:
        counts = [transport.callers() for transport in self._transports]
        return None if None in counts else sum(count for count in counts if count is not None)

    def pending(self) -> int:
        return sum(transport.pending() for transport in self._transports)

    def wait_for_pending(self, at_least: int, enough: int, timeout: float | None) -> int:
        if timeout == 0:
            for transport in self._processes:
                transport.read_all()
        elif self.waited():  # it may not block, and so not look itself for what was cancelled meanwhile
            self._poller.poll()
        return self._family[0].wait(at_least, enough, timeout)

    def stand_by(self, bell: LockWaker) -> None:
        self._family[0].stand_by()

    def waited(self) -> float:
        return max(transport.waited() for transport in self._transports)

    def take(self, max_items: int) -> list[Request]:
        taken: list[Request] = []
        for queue in sorted(self._family, key=PendingQueue.waited, reverse=True):
            if len(taken) < max_items:
                taken += queue.take(max_items - len(taken))
        return taken

    def resolve_batch(self, requests: Sequence[Request], replies: Sequence[TensorDictBase]) -> None:
        answer(requests, replies, failed=False)

    def fail_batch(self, requests: Sequence[Request], errors: Sequence[Exception]) -> None:
        answer(requests, errors, failed=True)
