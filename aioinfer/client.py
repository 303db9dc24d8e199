"""Clients: one that blocks a thread, and one that coroutines await."""

from __future__ import annotations

from abc import ABC, ABCMeta, abstractmethod
from asyncio import Future as AsyncFuture
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NoReturn, Self

from aioinfer.errors import ClientClosedError

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from aioinfer.entries import RequestLike

__all__ = ["CLOSED", "AsyncInferenceClient", "ClientMaker", "InferenceClient", "check_count"]


class _Closed:
    """The transport of a closed client: every use of it raises. An open client pays nothing for the check."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ClientClosedError("the client was closed; make another one")


CLOSED: Any = _Closed()


class _ClientType(ABCMeta):
    """Lets ``InferenceClient(transport)`` mean ``transport.client()``, as torchrl's users know it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is InferenceClient:
            return _only(*args, **kwargs).client()
        if cls is AsyncInferenceClient:
            return _only(*args, **kwargs).async_client()
        return super().__call__(*args, **kwargs)


def _only(transport: Any) -> Any:
    return transport


class _Handle(metaclass=_ClientType):
    """A handle on a transport. To copy it gives the same object, since a copy could not have a slot of its own."""

    @property
    def max_rows(self) -> int | None:
        """How many rows a request of this client may have at most; ``None``: as many as it likes."""
        return None

    @property
    def has_slot(self) -> bool:
        """Whether this client has a slot, and so one request under way at most."""
        return False

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def close(self) -> None:
        """Free the client's slot, connection and shared memory. Idempotent; any thread.

        Every later request raises :class:`ClientClosedError`. A request that is under way ends with this error too, if
        the client has a slot or a connection; otherwise it is answered. A connection that several clients share is
        closed with the last of them.
        """


class InferenceClient(_Handle):
    """Sends requests from plain threads. Made by ``transport.client()`` or ``server.client()``.

    Carries no right to start or stop the server. ``InferenceClient(transport)`` is ``transport.client()``. Use it as a
    context manager to close it.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def submit(self, td: RequestLike | None = None, **entries: Any) -> Future[TensorDictBase]:
        """Send one request without waiting for its reply.

        Args:
            td: one row, ``[]``; or any number of rows, ``[n]``, of which each forward pass serves as many as it
                takes (``max_batch_size``), all of them in one if it can. Where the server's ``request_spec`` has a
                batch size ``[*size]``, a row is ``[*size]``, and rows are ``[n, *size]``. It belongs to the
                server until the reply is there: don't write to it before. Instead of a TensorDict, a mapping with
                the entries.
            entries: the entries by name, ``client.submit(observation=array)``, which is faster than to make a
                TensorDict of them: tensors, numpy arrays, also read-only ones, numbers and nested mappings. They are
                one row; or ``n`` rows where the server's ``request_spec`` or the transport's tells so. Entries that
                are named as an argument of this function need a mapping.

        Returns:
            A future of the standard library that resolves to the reply: one row, or ``[n]`` rows in the order of the
            request, each with the version of the weights that computed it. Cancelling it before its batch
            left keeps the request from being computed; later, its reply is thrown away.

        Where the server refuses the request, the future fails with :class:`ServerOverloadedError`,
        :class:`ServerPausedError`, :class:`ServerClosedError`, or, where it lives in another process,
        :class:`PeerDiedError` or :class:`NoFreeSlotError`.

        Its callbacks run on a thread that serves other callers too. They must not block, nor call a client that
        blocks: hand long work to another thread.

        Raises:
            InvalidRequestError: ``td`` is neither TensorDict nor mapping, or not of the layout that the server
                takes; or an entry can't be a tensor.
            TypeError: there are both ``td`` and ``entries``.
            ClientBusyError: the client has a slot, and a request under way.
            ClientClosedError: the client was closed.
        """

    @abstractmethod
    def __call__(
        self, td: RequestLike | None = None, timeout: float | None = None, *, wait: bool = False, **entries: Any
    ) -> TensorDictBase:
        """Send one request and block for its reply.

        Args:
            td: as for :meth:`submit`.
            entries: as for :meth:`submit`.
            timeout: the request's deadline: seconds to wait for the reply, the time in the queue included; ``None``
                waits for ever.
            wait: where the queue is full, wait for space instead of raising.

        Returns:
            The reply, which the caller owns: it shares memory neither with ``td`` nor with any other reply.

        Raises:
            TimeoutError: no reply within ``timeout``. The request is withdrawn and the client usable at once.
            Exception: an error that :meth:`submit` raises or its future fails with: the server's refusal, or the error
                that the model raised on this request.
        """


class AsyncInferenceClient(_Handle):
    """Sends requests from coroutines, on whatever asyncio event loop runs them.

    Made by ``transport.async_client()`` or ``server.async_client()``. Use it as an async context manager to close it.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def submit(self, td: RequestLike | None = None, **entries: Any) -> AsyncFuture[TensorDictBase]:
        """Send one request without waiting for its reply.

        Call it on a running event loop. Requests that are made in one tick of a loop leave together.

        Args:
            td: as for :meth:`InferenceClient.submit`.
            entries: as for :meth:`InferenceClient.submit`.

        Returns:
            A future of the running loop: await it, gather it, cancel it. It fails as that of
            :meth:`InferenceClient.submit`.

        Raises:
            Exception: as for :meth:`InferenceClient.submit`.
        """

    def is_pending(self, future: AsyncFuture[TensorDictBase]) -> bool | None:
        """Whether the request of a future of this client still waits for a batch; ``None`` if that is not known here.

        It is known to clients of the server's own process. A batch may take the request at any moment.
        """
        return None

    def withdraw(self, future: AsyncFuture[TensorDictBase]) -> bool:
        """Take the request of a future of this client back, if no batch has taken it yet; the future is cancelled then.

        To cancel the future itself also keeps a request from being computed if no batch has taken it; but does not
        tell, and nobody gets the reply where one has.

        Returns:
            Whether it was taken back; ``False`` as well where that can't be told, as :meth:`is_pending` can't.
        """
        return False

    @property
    def least_seconds(self) -> float:
        """Seconds from when a batch takes a request to its reply, at least: the fastest of the latest 64 passes.

        0 before the first pass, and where it is not known, as :meth:`is_pending` is not.
        """
        return 0.0

    @abstractmethod
    async def __call__(
        self,
        td: RequestLike | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
        *,
        wait: bool = False,
        **entries: Any,
    ) -> TensorDictBase:
        """Send one request and suspend until its reply.

        Cancellation withdraws the request: if its batch has not left, it is never computed.

        Args:
            td: as for :meth:`InferenceClient.submit`.
            entries: as for :meth:`InferenceClient.submit`.
            timeout: the request's deadline: seconds to wait for the reply, the time in the queue included, as with
                ``asyncio.timeout``; ``None`` waits for ever.
            wait: where the queue is full, wait for space instead of raising.

        Returns:
            The reply, which the caller owns.

        Raises:
            Exception: as for :meth:`InferenceClient.__call__`.
        """


class ClientMaker(ABC):
    """Makes clients: a transport, a server, or the way to one."""

    def client(self, *, copy: bool = True) -> InferenceClient:
        """Make a client for a plain thread; see :meth:`clients`."""
        return self.clients(1, copy=copy)[0]

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        """Make a client for coroutines; see :meth:`clients`."""
        return self.async_clients(1, copy=copy)[0]

    @abstractmethod
    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        """Make clients for the threads of one process: all, or none where something is lacking.

        Clients of a transport between processes may be handed to another process, together, as one object: they have
        one connection, and the first process to use them has their slots.

        Args:
            count: how many.
            copy: where replies lie in shared memory, ``False`` lends the caller a view of each, valid until this
                client's next request. Elsewhere replies are the caller's own in either case.

        Raises:
            NoFreeSlotError: the transport has slots, and fewer are free.
            ClientClosedError: the way to the server was closed.
        """

    @abstractmethod
    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        """Make clients for the tasks of one process; see :meth:`clients`.

        Requests that are made in one tick of an event loop leave together.
        """


def check_count(count: int) -> None:
    """Raise :class:`ValueError` unless ``count`` is a positive integer."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"the number of clients must be an integer of at least 1, got {count!r}")
