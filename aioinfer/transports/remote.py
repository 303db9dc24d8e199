"""The way to a server elsewhere: in another process of this machine, or on another machine."""

from __future__ import annotations

import ssl
import weakref
from typing import TYPE_CHECKING, Self

from aioinfer.client import AsyncInferenceClient, ClientMaker, InferenceClient
from aioinfer.errors import ClientClosedError
from aioinfer.transports.ipc import client as ipc

if TYPE_CHECKING:
    from aioinfer.transports.network.client import NetworkEndpoint

__all__ = ["RemoteServer", "connect"]

_WEBSOCKETS = ("ws://", "wss://")


def connect(
    address: str,
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    timeout: float | None = 10.0,
) -> RemoteServer:
    """Find a running server: of this machine, in another process of this user, or elsewhere, by its URL.

    Blocks until the server has answered; ``await anyio.to_thread.run_sync(connect, address)`` does not block your
    event loop.

    Clients of a URL share one connection in each process, on which many requests are under way; those that tasks make
    in one tick of their event loop travel in one message. Where the connection is lost, the requests under way fail
    with :class:`PeerDiedError`, or with :class:`ServerClosedError` if the server has said that it shuts down. The
    clients connect anew by themselves: a request that is made meanwhile waits for the next attempt, 0.05 seconds
    at most, and fails with the same error if that fails.

    Args:
        address: the ``address`` of the server's transport; or the URL at which ``aioinfer serve``, or an app of
            :func:`aioinfer.web.create_app`, is served: ``ws://host:port``, or ``wss://host/prefix``.
        token: that the server needs, if it needs one.
        tls: how certificates are checked, for ``wss://``; by default those of the system are trusted.
        timeout: seconds to wait; ``None`` waits for ever, or at a URL until an attempt to connect fails.

    Raises:
        ServerClosedError: no server listens there.
        AccessDeniedError: the server needs a token, or another one; or may not be asked by this name.
        TimeoutError: no answer within ``timeout``; the server has not started, or its event loop is blocked.
        ImportError: ``address`` is a URL, and the packages for it are not installed.
        ValueError: ``address`` is a URL of another kind, or there is a ``token`` without a URL.
    """
    if "://" not in address:
        if token is not None or tls is not None:
            raise ValueError(f"a token, or TLS, needs a URL such as ws://host:8000, got {address!r}")
        return RemoteServer(ipc.find(address, timeout=timeout))
    if not address.startswith(_WEBSOCKETS):
        raise ValueError(f"expected the address of a transport, ws://host:port or wss://host:port, got {address!r}")
    try:
        from aioinfer.transports.network import client as network
    except ImportError as error:
        raise ImportError(
            f"{error.name} is not installed, which clients of a URL need: pip install 'aioinfer[serve]'",
            name=error.name,
        ) from error
    return RemoteServer(network.find(address, token=token, tls=tls, timeout=timeout))


class RemoteServer(ClientMaker):
    """A server elsewhere, as :func:`connect` finds it. It makes clients; each connects when it is first used.

    Where the transport has slots and too few are free then, the client's requests fail with :class:`NoFreeSlotError`.

    Use it as a context manager, or as an async one, to close the clients that it has made.
    """

    def __init__(self, endpoint: ipc.Endpoint | NetworkEndpoint) -> None:
        self._endpoint = endpoint
        self._made: weakref.WeakSet[ipc.Endpoint | NetworkEndpoint] = weakref.WeakSet()
        self._closed = False

    def __reduce__(self) -> tuple[type[RemoteServer], tuple[ipc.Endpoint | NetworkEndpoint]]:
        return RemoteServer, (self._endpoint,)  # what it has made stays here

    def close(self) -> None:
        """Close every client that was made here, and make no more. Idempotent; any thread."""
        self._closed = True
        for endpoint in [self._endpoint, *self._made]:
            endpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        return self._replace(count, copy).clients()

    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        return self._replace(count, copy).async_clients()

    def _replace(self, count: int, copy: bool) -> ipc.Endpoint | NetworkEndpoint:
        if self._closed:
            raise ClientClosedError("this way to the server was closed; connect again")
        endpoint = self._endpoint.replace(count, copy=copy)
        self._made.add(endpoint)
        return endpoint
