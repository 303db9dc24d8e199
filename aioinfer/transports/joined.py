"""Several transports under one server: tasks, threads and processes meet in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.errors import ServerClosedError
from aioinfer.transports.admission import Admission
from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.pending import PendingQueue
from aioinfer.transports.poller import Poller
from aioinfer.transports.processes import ProcessTransport, watch
from aioinfer.transports.queued import QueuedTransport
from aioinfer.transports.requests import Request, answer

__all__ = ["JoinedTransport"]


class JoinedTransport(InferenceTransport):
    """What ``InferenceServer(model, [a, b])`` makes of its transports: one that is all of them.

    The model thread waits for all of them at once, and takes what has waited longest, so that requests of one batch
    may have come by unlike ways. Clients are made by the transports; here, by the first.

    Args:
        transports: those of this package; each belongs to one server.

    Raises:
        TypeError: one of them has only the five verbs, and can't be waited for beside others.
        ValueError: none at all, or one twice.
    """

    def __init__(self, transports: Sequence[InferenceTransport]) -> None:
        if not transports or len(set(transports)) < len(transports):
            raise ValueError("expected at least one transport, and none twice")
        self.transports: list[QueuedTransport] = []
        for transport in transports:
            if not isinstance(transport, QueuedTransport):
                raise TypeError(f"a {type(transport).__qualname__} can't share a server with other transports")
            self.transports.append(transport)
        self._family: list[PendingQueue] = []
        self._poller = Poller()
        self._join()

    def _join(self) -> None:
        self._family.clear()
        for transport in self.transports:
            transport.join(self._family, self._poller)

    def client(self) -> InferenceClient:
        """Make a blocking client of the first transport."""
        return self.transports[0].client()

    def async_client(self) -> AsyncInferenceClient:
        """Make an awaitable client of the first transport."""
        return self.transports[0].async_client()

    # -- the five verbs --------------------------------------------------------------------------------

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        return self.transports[0].submit(td)

    def wait_for_work(self, timeout: float) -> None:
        self.wait_for_pending(1, 1, timeout)

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        requests = self.take(max_items)
        return [request.td for request in requests], requests

    def resolve(self, callback: Request, result: TensorDictBase) -> None:
        self.transports[0].resolve(callback, result)

    def resolve_exception(self, callback: Request, exc: BaseException) -> None:
        self.transports[0].resolve_exception(callback, exc)

    # -- batch-wise verbs ------------------------------------------------------------------------------

    def open(self, admission: Admission) -> None:
        for transport in self.transports:
            transport.open(admission)
        self._join()  # again: who served one of them alone meanwhile has undone it

    def close(self, error: ServerClosedError) -> None:
        for transport in self.transports:
            transport.close(error)

    def finish(self, error: ServerClosedError) -> None:
        for transport in self.transports:
            transport.finish(error)

    def wake(self) -> None:
        self.transports[0].wake()

    async def attend(self) -> None:
        processes = [transport for transport in self.transports if isinstance(transport, ProcessTransport)]
        pollers = set().union(*[transport.pollers() for transport in processes])

        def look() -> None:
            for transport in processes:
                transport.look()

        await watch(pollers, look)

    def callers(self) -> int | None:
        counts = [transport.callers() for transport in self.transports]
        return None if None in counts else sum(count for count in counts if count is not None)

    def pending(self) -> int:
        return sum(transport.pending() for transport in self.transports)

    def wait_for_pending(self, at_least: int, enough: int, timeout: float | None) -> int:
        if self.waited():  # it may not block, and so not look itself for what was cancelled meanwhile
            self._poller.look()
        return self._family[0].wait(at_least, enough, timeout)

    def waited(self) -> float:
        return max(transport.waited() for transport in self.transports)

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
