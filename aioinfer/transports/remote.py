"""Clients for a process that nobody has handed one."""

from __future__ import annotations

import sys
import time
import weakref
from typing import Self

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.errors import ClientClosedError, ServerClosedError
from aioinfer.ipc.pickling import loads
from aioinfer.ipc.sockets import FramedSocket, connect_unix, header
from aioinfer.transports.control import FromClient
from aioinfer.transports.tickets import Ticket

__all__ = ["Remote", "connect"]


def connect(address: str, *, timeout: float | None = 10.0) -> Remote:
    """Find a running server of this machine, in another process of this user.

    Blocks until the server's event loop has answered; ``await anyio.to_thread.run_sync(connect, address)`` does not
    block yours.

    Args:
        address: the ``address`` of the server's transport.
        timeout: seconds to wait; ``None`` waits for ever.

    Raises:
        ServerClosedError: nobody listens there.
        TimeoutError: no answer within ``timeout``; the server has not started, or its event loop is blocked.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    wire = FramedSocket(connect_unix(address, timeout))
    try:
        wire.send(header(FromClient.DESCRIBE).to_bytes(8, sys.byteorder))
        while True:
            if not wire.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"the server at {address} does not answer within {timeout} seconds")
            _, frames = wire.receive()
            for _, payload in frames:
                return Remote(loads(payload or b""))
    except EOFError:
        raise ServerClosedError(f"the server at {address} has ended") from None
    finally:
        wire.close()


class Remote:
    """A server elsewhere, as :func:`connect` finds it. It makes clients; each connects when it is first used.

    Where the transport has slots and too few are free then, the client's requests fail with :class:`NoFreeSlotError`.

    Use it as a context manager, or as an async one, to close the clients that it has made.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self._closed = False

    def __reduce__(self) -> tuple[type[Remote], tuple[Ticket]]:
        return Remote, (self._ticket,)  # what it has made stays here

    def close(self) -> None:
        """Close every client that was made here, and make no more. Idempotent; any thread."""
        self._closed = True
        for ticket in list(self._tickets):
            ticket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def client(self, *, copy: bool = True) -> InferenceClient:
        """Make a blocking client.

        Args:
            copy: ``False`` lends the caller a view of each reply, valid until this client's next request, where the
                transport has slots.

        Raises:
            ClientClosedError: the connection was closed.
        """
        return self.clients(1, copy=copy)[0]

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        """Make an awaitable client; see :meth:`client`."""
        return self.async_clients(1, copy=copy)[0]

    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        """Make blocking clients for the threads of one process, which has one connection for all of them."""
        return self._renewed(count, copy).clients()

    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        """Make awaitable clients for the tasks of one process, which has one connection for all of them."""
        return self._renewed(count, copy).async_clients()

    def _renewed(self, count: int, copy: bool) -> Ticket:
        if self._closed:
            raise ClientClosedError("this way to the server was closed; connect again")
        ticket = self._ticket.renewed(count, copy=copy)
        self._tickets.add(ticket)
        return ticket
