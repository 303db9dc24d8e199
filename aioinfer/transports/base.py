"""What a server needs of a transport, and what the clients of all transports of one process have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from tensordict import TensorDictBase

from aioinfer.errors import ServerClosedError, ServerOverloadedError, clone_exception
from aioinfer.transports.queue import RequestQueue
from aioinfer.transports.request import Request, set_exceptions, set_results

__all__ = ["Transport"]

T = TypeVar("T")


class Transport:
    """A transport as its server sees it: it puts requests into the server's queue, each with the sink of its reply.

    A subclass makes clients that put requests into ``queue``, and overrides the hooks below that it needs. The four
    verbs of :class:`~aioinfer.InferenceTransport` on the server's side work too, for code without a server.

    Any thread calls ``attach`` and the hooks, unless a hook says otherwise.
    """

    def __init__(self) -> None:
        self.queue = RequestQueue()
        """The server's queue, or the transport's own until a server attaches it. Read it anew for each request."""

    # -- attached to a server --------------------------------------------------------------------------

    def check_attach(self, queue: RequestQueue) -> None:
        """Raise :class:`RuntimeError` while another server runs on this transport."""
        if self.queue.serving and queue is not self.queue:
            raise RuntimeError(
                "the transport has a running server already; shut it down first, or make a second transport"
            )

    def attach(self, queue: RequestQueue) -> None:
        """Put requests into a server's queue from now on; pending ones follow.

        The queue has checked all of its transports before.
        """
        released, self.queue = self.queue, queue
        queue.transports.append(self)
        released.release(self)

    # -- hooks for the server --------------------------------------------------------------------------

    def start(self) -> None:
        """A model thread begins to serve the queue."""

    async def serve(self) -> None:
        """Do what is to be done on the server's event loop while it serves; it is cancelled at the end."""

    def callers(self) -> int | None:
        """How many requests could be pending at most; ``None`` if that is unknown."""
        return None

    def held(self) -> int:
        """How many requests the transport holds that count as pending, and are not in the queue yet."""
        return 0

    def claimed(self) -> int:
        """How many rows that take space are not in the queue: those held, and those on their way in."""
        return self.held()

    def read(self, *, wait: bool = False) -> None:
        """Put into the queue what callers have sent until now; with ``wait``, also what takes a moment to be had."""

    def forget_parent(self) -> None:
        """In a forked child: the requests are the parent's."""

    def on_admission(self) -> None:
        """The queue begins to refuse requests, or takes them again."""

    def close(self, error: ServerClosedError) -> None:
        """Take nothing new: the queue is closed. Idempotent."""

    def detach(self, error: ServerClosedError) -> None:
        """Fail what has no answer yet, flush, and let go: the queue is not served any more. Idempotent."""

    # -- the five verbs, but for submit ----------------------------------------------------------------

    def wait_for_work(self, timeout: float) -> None:
        """Block until a request is pending, or ``timeout`` seconds passed."""
        deadline = time.monotonic() + timeout
        while not self.queue.wait(1, 1, timeout):  # which returns early where a process has said something else
            timeout = deadline - time.monotonic()
            if timeout <= 0:
                return

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        """Take pending requests of up to ``max_items`` rows, and for each a handle for ``resolve``."""
        requests = self.queue.get_batch(max_items, largest=max_items)
        return [request.td for request in requests], requests

    def resolve(self, callback: Request, result: TensorDictBase) -> None:
        """Answer one request."""
        set_results([callback], [result])

    def resolve_exception(self, callback: Request, exc: BaseException) -> None:
        """Fail one request."""
        set_exceptions([callback], [clone_exception(exc)])

    # -- callers that wait for space -------------------------------------------------------------------

    def put_when_not_full(self, td: Any, put: Callable[[], T], deadline: float | None) -> T:
        """Call ``put`` until the queue has space for the request ``td``, and return what it returns.

        Raises:
            TimeoutError: there was no space until ``deadline``, on the clock of ``time.monotonic``.
        """
        turn: list[bool] = []  # has an element from when this caller is woken until it tries again
        try:
            while True:
                not_full = self.queue.not_full
                try:
                    return put()
                except ServerOverloadedError:
                    turn.clear()
                    not_full.wait(self._rows(td), deadline, turn)
        except BaseException:
            if turn:
                self.queue.not_full.notify(1)
            raise

    def _rows(self, td: Any) -> int:
        """How many rows an admitted request has."""
        if type(td) is dict:
            rows = self.queue.admission.row_count(td)
            return 1 if rows is None else rows
        return 1 if td.batch_size == self.queue.admission.batch_size else int(td.batch_size[0])

    async def aput_when_not_full(self, td: Any, put: Callable[[], T]) -> T:
        """Do as :meth:`put_when_not_full`, without blocking the event loop."""
        turn: list[bool] = []  # has an element from when this caller is woken until it tries again
        try:
            while True:
                not_full = self.queue.not_full
                try:
                    return put()
                except ServerOverloadedError:
                    turn.clear()
                    await not_full.await_space(self._rows(td), turn)
        except BaseException:
            if turn:
                self.queue.not_full.notify(1)
            raise
