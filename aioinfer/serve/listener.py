"""Sockets to listen on, and the connections that come: uvicorn's protocols, without its signals and its shutdown."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import ipaddress
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from aioinfer.serve.guard import ConnectionGuard, GuardedHttp
from aioinfer.serve.whole_requests import http_of
from aioinfer.web.app import App
from aioinfer.web.asgi import ASGIApp
from aioinfer.web.limits import Limits

__all__ = ["AddressError", "Listener", "bind", "bind_unix", "is_local", "unlink"]

_BACKLOG = 2048
_LOOK_EVERY = 0.01  # seconds, while connections end
_ABORT_GRACE = 1.0  # seconds for the tasks of connections that were cut
_MORE_PORTS = 100
_MISSING = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""Errors of addresses that this machine does not have, such as ``::1`` of ``localhost`` where there is no IPv6."""

_log = logging.getLogger("aioinfer.serve")


class AddressError(Exception):
    """An address can't be listened on; the message has one line."""


def is_local(host: str) -> bool:
    """Whether only this machine reaches what listens there.

    Raises:
        AddressError: the name is unknown.
    """
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in _resolve(host, 0))


def bind(host: str, port: int) -> list[socket.socket]:
    """Make sockets for all addresses of a host that this machine has.

    Args:
        host: a name, or an address.
        port: of all of them; 0 takes a free one.

    Raises:
        AddressError: the name is unknown, or the port is taken.
    """
    addresses = sorted(_resolve(host, port))
    for _ in range(0 if port else _MORE_PORTS):
        with suppress(_TakenError):  # what is free at one address may be taken at another
            return _bind(addresses, port)
    return _bind(addresses, port)


class _TakenError(AddressError):
    """Somebody else listens there."""


def _bind(addresses: Sequence[tuple[int, tuple[Any, ...]]], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    missing: list[AddressError] = []
    with ExitStack() as made:
        for family, address in addresses:
            chosen = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(made.enter_context(_listen(family, (address[0], chosen, *address[2:]))))
            except OSError as error:
                kind = _TakenError if error.errno == errno.EADDRINUSE else AddressError
                told = kind(f"can't listen on {address[0]}, port {chosen}: {error.strerror}")
                if error.errno not in _MISSING:
                    raise told from None
                missing.append(told)
        made.pop_all()
    if not sockets:
        raise missing[0]
    for told in missing:
        _log.info("%s", told)
    return sockets


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    with ExitStack() as made:
        # Of TCP by number, not by default: asyncio switches off Nagle's algorithm, which costs 40 ms, only then.
        listening = made.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)  # at once: until then another one may bind the same port
        made.pop_all()
    return listening


def _resolve(host: str, port: int) -> set[tuple[int, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # the latter of a name that is too long
        raise AddressError(f"can't listen on {host!r}: {getattr(error, 'strerror', None) or error}") from None
    return {(family, address) for family, _, _, _, address in found}


def bind_unix(path: Path) -> socket.socket:
    """Make a socket in the file system, and take the place of one that nobody listens on any more.

    Who may connect is what the umask says: by default the user alone, and with 007 the group too.

    Raises:
        AddressError: a server listens there, or there is another file.
    """
    with _locked(path.parent), ExitStack() as made:
        try:
            with suppress(FileNotFoundError):
                _remove_unused(path)
            listening = made.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listening.bind(str(path))
            listening.listen(_BACKLOG)
        except OSError as error:
            raise AddressError(f"can't listen on {path}: {error.strerror or error}") from None
        made.pop_all()
    return listening


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only server that takes a place in a folder: two of them may find the same socket unused."""
    with ExitStack() as stack:
        with suppress(OSError):  # of a folder that can't be read, or a file system without locks
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _remove_unused(path: Path) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise AddressError(f"{path} is there, and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        else:
            raise AddressError(f"a server listens on {path} already")


def unlink(path: Path, inode: int) -> None:
    """Remove a socket from the file system, unless another server has put its own there."""
    with suppress(OSError):
        if os.lstat(path).st_ino == inode:
            path.unlink()


class Listener:
    """Accepts connections, and serves an app on them.

    Args:
        app: of ASGI; it gets no lifespan.
        sockets: bound; it closes them.
        guard: watches the connections.
        limits: of messages.
        tls: certificate and key; ``None``: connections are plain.
        log_level: of uvicorn's loggers; with ``"debug"``, each request is logged.
        app_that_serves: returns ``app`` if that takes requests without ASGI now, which those get that come whole;
            ``None``: all go by ASGI, as they do where each is logged.
    """

    def __init__(
        self,
        app: ASGIApp,
        sockets: Sequence[socket.socket],
        *,
        guard: ConnectionGuard,
        limits: Limits,
        tls: ssl.SSLContext | None = None,
        log_level: str = "warning",
        app_that_serves: Callable[[], App | None] | None = None,
    ) -> None:
        self._sockets = sockets
        self._guard = guard
        self._tls = tls
        self._state = ServerState()
        whole = None if app_that_serves is None or log_level == "debug" else http_of(app_that_serves)
        self._http, websocket = guard.protocols(whole)
        self._config = uvicorn.Config(
            app,
            http=self._http,
            ws=websocket,
            interface="asgi3",
            lifespan="off",
            ws_max_size=limits.max_message_size,
            ws_per_message_deflate=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            access_log=log_level == "debug",
            log_config=None,
            log_level=log_level,
        )
        self._servers: list[asyncio.Server] = []

    async def open(self) -> None:
        """Accept connections from now on."""
        self._config.load()
        loop = asyncio.get_running_loop()
        timeout = None if self._tls is None else self._guard.head_timeout
        for listening in self._sockets:
            self._servers.append(
                await loop.create_server(
                    self._make_protocol, sock=listening, ssl=self._tls, backlog=_BACKLOG, ssl_handshake_timeout=timeout
                )
            )

    def _make_protocol(self) -> asyncio.Protocol:
        return self._http(config=self._config, server_state=self._state, app_state={})

    async def close(self, grace: float) -> None:
        """Accept no more, close connections as they are idle, and cut the others.

        Args:
            grace: seconds for requests to be answered, and for WebSockets that the app has closed to hear so.
        """
        for server in self._servers:
            server.close()
        for listening in self._sockets:
            listening.close()
        connections, tasks = self._state.connections, self._state.tasks
        for connection in list(connections):
            if isinstance(connection, GuardedHttp):  # uvicorn would close WebSockets with 1012, before their replies
                connection.shutdown()
        deadline = asyncio.get_running_loop().time() + grace
        while (connections or tasks) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - uvicorn's sets
            await asyncio.sleep(_LOOK_EVERY)
        for connection in list(connections):
            connection.transport.abort()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_ABORT_GRACE)
            for task in late:
                task.cancel()
        self._guard.close()
