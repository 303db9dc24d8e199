"""One WebSocket to a server: the handshake, messages, and how it is noticed that the other end is gone."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from aioinfer.errors import AccessDeniedError, InvalidRequestError, PeerDiedError, ServerClosedError
from aioinfer.transports.network.messages import decode_header
from aioinfer.transports.network.protocol import PROTOCOL, STREAM_PATH

__all__ = ["Address", "Hello", "Link", "UnreachableError", "open_link"]

PING_INTERVAL = 10.0
"""Seconds after which a connection on which nothing came is asked for a sign of life, and then given up."""
GOING_AWAY = 1001
_CLOSE_TIMEOUT = 1.0  # seconds for what is still to be written
_WRITE_LIMIT = 4 * 2**20  # bytes that may wait for the network before no more messages are written
_DENIED = (401, 403, 421)


class UnreachableError(Exception):
    """There is no server, or no way to it."""


class Address(NamedTuple):
    """Where a server is, and what lets its clients in.

    Attributes:
        url: ``ws://`` or ``wss://``, with the prefix of the app if it has one.
        token: of the server; ``None``: it needs none.
        tls: for ``wss://``; ``None`` checks certificates as the system does.
    """

    url: str
    token: str | None = None
    tls: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"Address({self.url!r})"  # the token is nobody's business


class Hello(NamedTuple):
    """What the server says of itself.

    Attributes:
        policy: its name.
        max_message_size: bytes of a message, at most.
        max_pending: requests without a reply, at most.
    """

    policy: str
    max_message_size: int
    max_pending: int


class Link(asyncio.Protocol):
    """A WebSocket over a stream of bytes. Loop thread only, but for ``forget_parent``.

    Args:
        address: of the server.
        on_message: takes each message; what it raises ends the link.
        on_writable: called when messages may be written again.

    Attributes:
        hello: resolves to what the server says of itself, or fails as the handshake does.
        lost: resolves when the connection is gone.
        writable: whether the network takes more now.
    """

    def __init__(self, address: Address, on_message: Callable[[Any], None], on_writable: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._address = address
        self._on_message = on_message
        self._on_writable = on_writable
        self._websocket = ClientProtocol(parse_uri(stream_url(address.url)), max_size=None)
        self._transport: asyncio.Transport
        self._fragments: list[Any] = []
        self._alive = True  # whether something has come since the last look
        self._watch: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self.hello: asyncio.Future[Hello] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.writable = True

    @property
    def error(self) -> Exception:
        """Why it is lost."""
        if self._error is not None:
            return self._error
        close = self._websocket.close_rcvd
        if close is None:
            return PeerDiedError(f"the connection to {self._address.url} was lost")
        if close.code == GOING_AWAY:
            return ServerClosedError(f"{close.reason or 'the server is shut down'} ({self._address.url})")
        said = f"{close.code} {close.reason}".strip()
        return PeerDiedError(f"the connection to {self._address.url} was closed: {said}")

    # -- of asyncio ------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=_WRITE_LIMIT)
        request = self._websocket.connect()
        if self._address.token is not None:
            request.headers["Authorization"] = f"Bearer {self._address.token}"
        self._websocket.send_request(request)
        self._flush()
        self._watch = asyncio.get_running_loop().call_later(PING_INTERVAL, self._look)

    def data_received(self, data: bytes) -> None:
        self._alive = True
        self._websocket.receive_data(data)
        try:
            for event in self._websocket.events_received():
                if isinstance(event, Frame):
                    self._take_frame(event)
            if (refusal := self._websocket.handshake_exc) is not None:
                self._fail(_refusal(self._address, refusal))
                return
        except Exception as error:
            url = self._address.url
            if self.hello.done():
                unreadable: Exception = PeerDiedError(f"hung up on {url}, which says what can't be handled: {error}")
            else:
                unreadable = ServerClosedError(f"{url} is no inference server for these clients: {error}")
            unreadable.__cause__ = error
            self._fail(unreadable)
            return
        self._flush()
        if self._websocket.close_expected() and self._websocket.state is not State.CONNECTING:
            self._transport.close()

    def eof_received(self) -> None:
        self._websocket.receive_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if not self.hello.done():
            self.hello.set_exception(self._error or UnreachableError(f"{self._address.url} hung up"))
            self.hello.exception()  # it may have no reader any more
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._on_writable()

    # -- messages --------------------------------------------------------------------------------------

    def _take_frame(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.BINARY, Opcode.CONT):
            if self._fragments or not frame.fin:
                self._fragments.append(frame.data)
                if not frame.fin:
                    return
                message, self._fragments = b"".join(self._fragments), []
            else:
                message = frame.data  # type: ignore[assignment]
            if self.hello.done():
                self._on_message(message)
            else:
                self.hello.set_result(_hello(message))
        elif frame.opcode is Opcode.TEXT:
            raise InvalidRequestError("a text")

    def send(self, message: bytes) -> None:
        """Write a message now, or as soon as there is room."""
        if self._websocket.state is State.OPEN:
            self._websocket.send_binary(message)
            self._flush()

    async def close(self) -> None:
        """Say goodbye, and close the connection, whether or not the other end reads."""
        if self._websocket.state is State.OPEN:
            self._websocket.send_close(1000)
            self._flush()
        self._transport.close()
        await asyncio.wait([self.lost], timeout=_CLOSE_TIMEOUT)
        self._transport.abort()
        await asyncio.wait([self.lost])

    def forget_parent(self) -> None:
        """In a forked child: let the connection be the parent's alone."""
        with suppress(OSError, AttributeError):  # it is closed, or was never made
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, self._transport.get_extra_info("socket").fileno())  # which closes the child's end
            os.close(nowhere)

    def _flush(self) -> None:
        for data in self._websocket.data_to_send():
            if data:
                self._transport.write(data)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        if not self.hello.done():
            self.hello.set_exception(error)
        self._transport.abort()

    def _look(self) -> None:
        """Give the connection up where nothing has come for two intervals, though it was asked for a sign of life."""
        if not self._alive:
            self._fail(PeerDiedError(f"{self._address.url} gave no sign of life for {2 * PING_INTERVAL:g} seconds"))
            return
        self._alive = False
        if self._websocket.state is State.OPEN:
            self._websocket.send_ping(b"")
            self._flush()
        self._watch = asyncio.get_running_loop().call_later(PING_INTERVAL, self._look)


async def open_link(
    address: Address, on_message: Callable[[Any], None], on_writable: Callable[[], None]
) -> tuple[Link, Hello]:
    """Connect.

    Raises:
        UnreachableError: there is no server there.
        ServerClosedError: it is shutting down, or no server of this kind.
        AccessDeniedError: it does not take this caller.
    """
    parts = urlsplit(address.url)
    secure = parts.scheme == "wss"
    tls = (address.tls or ssl.create_default_context()) if secure else None
    try:
        _, link = await asyncio.get_running_loop().create_connection(
            lambda: Link(address, on_message, on_writable),
            parts.hostname or "",
            parts.port or (443 if secure else 80),
            ssl=tls,
        )
    except OSError as error:
        raise UnreachableError(f"no server can be reached at {address.url}: {error}") from error
    try:
        return link, await link.hello
    except BaseException:
        link._transport.abort()
        raise


def stream_url(url: str) -> str:
    """The URL of the WebSocket of an app."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith(STREAM_PATH) else path + STREAM_PATH).geturl()


def check_url(url: str) -> None:
    """Raise :class:`ValueError` unless this is the URL of a WebSocket."""
    try:
        parse_uri(stream_url(url))
    except (ValueError, InvalidURI) as error:
        raise ValueError(f"expected ws://host:port or wss://host:port, got {url!r}: {error}") from None


def _hello(message: Any) -> Hello:
    header, _, _ = decode_header(message)
    if header.get("protocol") != PROTOCOL:
        raise InvalidRequestError(f"protocol {header.get('protocol')!r}; this client speaks {PROTOCOL}")
    hello = Hello(header["policy"], header["max_message_size"], header["max_pending"])
    if type(hello.policy) is not str or not all(type(limit) is int and limit > 0 for limit in hello[1:]):
        raise InvalidRequestError(f"it has no name, or no room for requests: {hello}")
    return hello


def _refusal(address: Address, error: Exception) -> Exception:
    if not isinstance(error, InvalidStatus):
        kind = ServerClosedError if isinstance(error, InvalidHandshake) else UnreachableError
        return kind(f"{address.url} is no inference server: {error}")
    status = error.response.status_code
    try:
        reason = json.loads(error.response.body or b"")["error"]
    except (ValueError, TypeError, KeyError):
        reason = error.response.reason_phrase
    if status in _DENIED:
        return AccessDeniedError(f"{address.url} answers HTTP {status}: {reason}")
    if status == 503:
        return ServerClosedError(f"{address.url} answers HTTP 503: {reason}")
    return ServerClosedError(f"{address.url} is no inference server: it answers HTTP {status} ({reason})")
