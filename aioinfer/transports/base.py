"""The contract between a server and whatever carries requests and replies.

To write a transport, subclass :class:`InferenceTransport` and implement its five verbs; nothing else
is needed, not even ``super().__init__()``. It then works with :class:`~aioinfer.InferenceServer` and
with both clients. ``aioinfer.testing.check_transport`` runs the contract's tests over it.

A faster transport also overrides the batch-wise verbs, which this class defines in terms of the
five, and ``client`` / ``async_client``.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.errors import ServerClosedError, own_error
from aioinfer.interaction import unstamp
from aioinfer.transports.admission import Admission
from aioinfer.transports.bridge import BridgedAsyncClient, BridgedClient, OpenRequests
from aioinfer.transports.requests import Request

__all__ = ["InferenceTransport"]

# A foreign `wait_for_work` can't be interrupted: the server looks up this often, in seconds, which
# costs an idle server less than 0.1 % of a core.
_LOOK_UP_INTERVAL = 0.3

_log = logging.getLogger("aioinfer")


class InferenceTransport(ABC):
    """Carries requests to a server and replies back."""

    # -- the five verbs --------------------------------------------------------------------------------

    @abstractmethod
    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Enqueue one request (any thread).

        Returns:
            A future that resolves to the output TensorDict: of ``concurrent.futures``, or one that
            behaves as it (``result(timeout)``, ``exception``, ``done``, ``cancel``,
            ``add_done_callback``).
        """

    @abstractmethod
    def wait_for_work(self, timeout: float) -> None:
        """Block until a request is pending, or ``timeout`` seconds passed (server side)."""

    @abstractmethod
    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        """Take up to ``max_items`` pending requests, without blocking (server side).

        Returns:
            The requests, and for each an opaque handle that ``resolve`` understands.
        """

    @abstractmethod
    def resolve(self, callback: Any, result: TensorDictBase) -> None:
        """Answer one request (server side). May raise if its caller is gone."""

    @abstractmethod
    def resolve_exception(self, callback: Any, exc: BaseException) -> None:
        """Fail one request (server side). May raise if its caller is gone."""

    # -- clients ---------------------------------------------------------------------------------------

    def client(self) -> InferenceClient:
        """Make a client for a plain thread."""
        return BridgedClient(self.submit, self._open_requests)

    def async_client(self) -> AsyncInferenceClient:
        """Make a client for coroutines."""
        return BridgedAsyncClient(self.submit, self._open_requests)

    # -- batch-wise verbs, called by the server --------------------------------------------------------

    def open(self, admission: Admission) -> None:
        """Take requests, from now on under the terms of ``admission``."""
        self._open_requests.open(admission)

    def close(self, error: ServerClosedError) -> None:
        """Refuse what comes from now on, and fail what is pending if that can be told from what is under way."""
        self._open_requests.close(error)

    def finish(self, error: ServerClosedError) -> None:
        """Fail every request that has no answer yet; nobody takes any more."""
        self.close(error)
        while requests := self.take(1024):
            self.fail_batch(requests, [own_error(error) for _ in requests])
        self._open_requests.fail_all(error)

    def wake(self) -> None:  # noqa: B027 - to do nothing is right for most
        """Make a running ``wait_for_pending`` return early, if the transport can."""

    async def attend(self) -> None:  # noqa: B027 - most need nothing
        """Do what is to be done on the server's event loop while it serves; it is cancelled at the end."""

    def callers(self) -> int | None:
        """How many requests could be pending at most; ``None`` if that is unknown."""
        return None

    def pending(self) -> int:
        """How many requests wait now, as far as the transport knows."""
        return self._open_requests.pending

    def wait_for_pending(self, at_least: int, enough: int, timeout: float | None) -> int:
        """Block until requests are pending, ``wake`` was called, or ``timeout`` seconds passed. Claims nothing.

        Args:
            at_least: how many requests to wait for.
            enough: with fewer, a transport may wait a moment longer for requests that it knows to be coming.
            timeout: seconds; ``None`` waits for ever.

        Returns:
            How many are pending; it may return early.
        """
        if len(self._held) < at_least:
            self.wait_for_work(_LOOK_UP_INTERVAL if timeout is None else max(0.0, min(timeout, _LOOK_UP_INTERVAL)))
            self._hold(at_least - len(self._held))
        return len(self._held)

    def waited(self) -> float:
        """Seconds since the oldest pending request arrived."""
        return time.perf_counter() - self._held[0].submitted_at if self._held else 0.0

    def take(self, max_items: int) -> list[Request]:
        """Claim up to ``max_items`` pending requests, without blocking."""
        if len(self._held) < max_items:
            self._hold(max_items - len(self._held))
        taken = [self._held.popleft() for _ in range(min(max_items, len(self._held)))]
        self._open_requests.claim(len(taken))
        return taken

    def resolve_batch(self, requests: Sequence[Request], replies: Sequence[TensorDictBase]) -> None:
        """Answer claimed requests."""
        self._open_requests.settle(len(requests))
        for request, reply in zip(requests, replies, strict=True):
            try:
                self.resolve(request.receiver, reply)
            except Exception as error:
                self._try_to_fail(request, error)

    def fail_batch(self, requests: Sequence[Request], errors: Sequence[Exception]) -> None:
        """Fail claimed requests, each with an error of its own."""
        self._open_requests.settle(len(requests))
        for request, error in zip(requests, errors, strict=True):
            self._try_to_fail(request, error)

    def _try_to_fail(self, request: Request, error: Exception) -> None:
        try:
            self.resolve_exception(request.receiver, error)
        except Exception:  # its caller cancelled it, most likely; in no case may it cost the others their replies
            _log.debug("%s could not fail a request", type(self).__qualname__, exc_info=True)

    # -- what the five verbs lack ----------------------------------------------------------------------

    # Made when first asked for, since a subclass need not call __init__.
    @cached_property
    def _held(self) -> deque[Request]:
        """Drained but not yet claimed (model thread only): the five verbs can't look without taking."""
        return deque()

    @cached_property
    def _open_requests(self) -> OpenRequests:
        return OpenRequests()

    def _hold(self, max_items: int) -> None:
        inputs, callbacks = self.drain(max_items)
        now = time.perf_counter()
        for td, callback in zip(inputs, callbacks, strict=True):
            td, mode = unstamp(td)
            self._held.append(Request(td, callback, None, now, mode))
