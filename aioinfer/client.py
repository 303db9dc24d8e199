"""What callers hold: a client that blocks, and a client that is awaited."""

from __future__ import annotations

from abc import ABC, abstractmethod
from asyncio import Future as AsyncFuture
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensordict import TensorDictBase

__all__ = ["AsyncInferenceClient", "InferenceClient"]


class _Handle:
    """A client is a handle on its transport: copying it gives the same handle, as with a file."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class InferenceClient(_Handle, ABC):
    """Sends requests from plain threads. Made by ``transport.client()`` or ``server.client()``.

    Carries no right to start or stop the server.
    """

    @abstractmethod
    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Send one request without waiting for its reply.

        Args:
            td: one request, without batch dimension unless the server's ``request_spec`` has one. It
                belongs to the server until the reply is there: don't write to it before.

        Returns:
            A future of the standard library that resolves to the reply. Cancelling it before its batch
            left keeps the request from being computed; later, its reply is thrown away.

        Raises:
            InvalidRequestError: ``td`` is no TensorDict, or not of the layout that the server takes.
            ServerOverloadedError: ``max_pending`` requests wait already.
            ServerClosedError: the server is shut down.
        """

    @abstractmethod
    def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:
        """Send one request and block for its reply.

        Args:
            td: as for :meth:`submit`.
            timeout: seconds to wait for the reply, the time in the queue included; ``None`` waits for ever.
            wait: where the queue is full, wait for room instead of raising.

        Returns:
            The reply, which the caller owns: it shares memory neither with ``td`` nor with any other reply.

        Raises:
            TimeoutError: no reply within ``timeout``. The request is withdrawn and the client usable at once.
            Exception: what :meth:`submit` raises, and the error that the model raised on this request.
        """


class AsyncInferenceClient(_Handle, ABC):
    """Sends requests from coroutines, on whatever asyncio event loop runs them.

    Made by ``transport.async_client()`` or ``server.async_client()``.
    """

    @abstractmethod
    def submit(self, td: TensorDictBase) -> AsyncFuture[TensorDictBase]:
        """Send one request without waiting for its reply.

        Call it on a running event loop. Requests that are made in one tick of a loop leave together.

        Args:
            td: as for :meth:`InferenceClient.submit`.

        Returns:
            A future of the running loop: await it, gather it, cancel it.

        Raises:
            Exception: as for :meth:`InferenceClient.submit`.
        """

    @abstractmethod
    async def __call__(self, td: TensorDictBase, *, wait: bool = False) -> TensorDictBase:
        """Send one request and suspend until its reply.

        For a deadline use ``asyncio.timeout``. Cancellation withdraws the request: if its batch has
        not left, it is never computed.

        Args:
            td: as for :meth:`InferenceClient.submit`.
            wait: where the queue is full, wait for room instead of raising.

        Returns:
            The reply, which the caller owns.

        Raises:
            Exception: as for :meth:`InferenceClient.submit`, and the error that the model raised on this request.
        """
