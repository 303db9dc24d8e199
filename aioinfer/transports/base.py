"""What carries requests and replies: as users write it, and as a server needs it.

To write a transport, subclass :class:`InferenceTransport` and implement its five verbs; nothing else
is needed, not even ``super().__init__()``, and no other name is taken but those of its clients. It then works with
:class:`~aioinfer.InferenceServer` and with both clients. ``aioinfer.testing.check_transport`` runs the contract's tests
over it.

A faster transport is a :class:`ServedTransport` too, whose verbs are about batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient, check_count
from aioinfer.errors import ServerClosedError
from aioinfer.transports.admission import Admission
from aioinfer.transports.bridge import BridgedAsyncClient, BridgedClient, OpenRequests
from aioinfer.transports.requests import Request
from aioinfer.wakers import LockWaker

__all__ = ["InferenceTransport", "ServedTransport"]


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

    def client(self, *, copy: bool = True) -> InferenceClient:
        """Make a client for a plain thread.

        Args:
            copy: ``False`` lends the caller a view of each reply, valid until this client's next request, where the
                transport has replies in shared memory. Elsewhere replies are the caller's own in either case.
        """
        return BridgedClient(self.submit, self._aioinfer_requests)

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        """Make a client for coroutines; see :meth:`client`."""
        return BridgedAsyncClient(self.submit, self._aioinfer_requests)

    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        """Make ``count`` clients for the threads of one process: all, or none where something is lacking."""
        return _make(count, self.client if copy else lambda: self.client(copy=False))

    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        """Make ``count`` clients for the tasks of one process: all, or none where something is lacking."""
        return _make(count, self.async_client if copy else lambda: self.async_client(copy=False))

    # Made when first asked for, since a subclass need not call __init__.
    @cached_property
    def _aioinfer_requests(self) -> OpenRequests:
        return OpenRequests()


def _make(count: int, make: Any) -> list[Any]:
    check_count(count)
    made: list[Any] = []
    try:
        for _ in range(count):
            made.append(make())  # noqa: PERF401 - what was made is closed if the next can't be
    except BaseException:
        for client in made:
            client.close()
        raise
    return made


class ServedTransport(ABC):
    """What a server needs of a transport, in batches."""

    @abstractmethod
    def check_open(self, admission: Admission) -> None:
        """Raise :class:`RuntimeError` if ``open`` would, for another server runs; change nothing."""

    @abstractmethod
    def open(self, admission: Admission) -> None:
        """Take requests, from now on under the terms of ``admission``."""

    @abstractmethod
    def close(self, error: ServerClosedError) -> None:
        """Refuse what comes from now on, and fail what is pending if that can be told from what is under way."""

    @abstractmethod
    def finish(self, error: ServerClosedError) -> None:
        """Fail every request that has no answer yet; nobody takes any more."""

    @abstractmethod
    def wake(self) -> None:
        """Make a running ``wait_for_pending`` return early, if the transport can."""

    async def attend(self) -> None:  # noqa: B027 - most need nothing
        """Do what is to be done on the server's event loop while it serves; it is cancelled at the end."""

    def callers(self) -> int | None:
        """How many requests could be pending at most; ``None`` if that is unknown."""
        return None

    @abstractmethod
    def pending(self) -> int:
        """How many requests wait now, as far as the transport knows."""

    @abstractmethod
    def wait_for_pending(self, at_least: int, enough: int, timeout: float | None) -> int:
        """Block until requests are pending, ``wake`` was called, or ``timeout`` seconds passed. Claims nothing.

        Args:
            at_least: how many requests to wait for.
            enough: with fewer, a transport may wait a moment longer for requests that it knows to be coming.
            timeout: seconds; ``None`` waits for ever.

        Returns:
            How many are pending; it may return early.
        """

    def stand_by(self, bell: LockWaker) -> None:
        """Block while nothing is to be claimed, until ``bell`` rings and ``wake`` is called; it may return early.

        A transport to other processes goes on reading what they send, and sending what they have not read yet.
        """
        bell.wait(None)

    @abstractmethod
    def waited(self) -> float:
        """Seconds since the oldest pending request arrived."""

    @abstractmethod
    def take(self, max_items: int) -> list[Request]:
        """Claim up to ``max_items`` pending requests, without blocking."""

    @abstractmethod
    def resolve_batch(self, requests: Sequence[Request], replies: Sequence[TensorDictBase]) -> None:
        """Answer claimed requests."""

    @abstractmethod
    def fail_batch(self, requests: Sequence[Request], errors: Sequence[Exception]) -> None:
        """Fail claimed requests, each with an error of its own."""
